"""A view is an explicit record, a box and a flip, that both stages render through one function.

A cached target belongs to one crop: the student must be shown, byte for byte, the pixels that the teacher saw. So the
box is drawn once, stored beside the target, and never drawn again by the trainer.
"""

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.configs.data import ViewConfig
from pipeline.data.decoding import decode, decode_array
from pipeline.data.rng import Stream, uniforms

_ATTEMPTS = 10


@dataclass(frozen=True)
class View:
    """One crop of one image: `box` is (top, left, height, width) in source pixels, after the EXIF rotation."""

    box: tuple[int, int, int, int]
    hflip: bool


def draw_view(config: ViewConfig, index: int, view: int, height: int, width: int) -> View:
    """The view number `view` of sample `index`, for an image of height × width pixels.

    The box follows Inception's random resized crop (Szegedy et al. 2015, as torchvision's RandomResizedCrop draws it):
    up to ten tries of an area share and a log-uniform aspect ratio, then the largest central box of an allowed ratio.
    """
    draws = uniforms(4 * _ATTEMPTS + 1, Stream.VIEW, config.seed, index, view)
    hflip = bool(draws[-1] < config.hflip)
    log_low, log_high = math.log(config.ratio[0]), math.log(config.ratio[1])
    for u_area, u_ratio, u_top, u_left in draws[:-1].reshape(_ATTEMPTS, 4):
        area = height * width * (config.scale[0] + u_area * (config.scale[1] - config.scale[0]))
        ratio = math.exp(log_low + u_ratio * (log_high - log_low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return View((int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w), hflip)
    return View(_central_box(config, height, width), hflip)


def render(image: Image.Image, view: View, size: int) -> Image.Image:
    """The view's pixels: an RGB image of size × size, bicubic with antialiasing, cropped first and mirrored last."""
    top, left, height, width = view.box
    pixels = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
    return pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.hflip else pixels


def render_torch(pixels: NDArray[np.uint8], view: View, out: NDArray[np.uint8]) -> None:
    """What `render` makes of an image's pixels [H, W, 3], into `out` [S, S, 3], by torch's kernel for uint8.

    Its bytes are the same with and without AVX2 or AVX-512 and for any number of threads; they differ from Pillow's.
    """
    top, left, height, width = view.box
    cut = torch.from_numpy(pixels[top : top + height, left : left + width]).permute(2, 0, 1).unsqueeze(0)
    size = (out.shape[0], out.shape[1])
    shown = F.interpolate(cut, size=size, mode="bicubic", antialias=True, align_corners=False)[0].permute(1, 2, 0)
    torch.from_numpy(out).copy_(shown.flip(1) if view.hflip else shown)


class Picture:
    """An image that is decoded once and shown as any number of views, in the form that `interpolation` cuts from.

    Raises:
        DataError: these bytes are no readable image.
    """

    def __init__(self, data: bytes, config: ViewConfig) -> None:
        self._config = config
        self._pixels = decode_array(data) if config.interpolation == "torch" else decode(data)
        size = self._pixels.shape[:2] if isinstance(self._pixels, np.ndarray) else self._pixels.size[::-1]
        self.height, self.width = size

    def draw(self, index: int, view: int) -> View:
        """The view number `view` of sample `index`, of which this is the image."""
        return draw_view(self._config, index, view, self.height, self.width)

    def show(self, view: View, out: NDArray[np.uint8]) -> None:
        """Render a view into `out` [S, S, 3], C-contiguous."""
        if isinstance(self._pixels, np.ndarray):
            render_torch(self._pixels, view, out)
        else:
            out[...] = np.asarray(render(self._pixels, view, self._config.image_size))


def center_view(height: int, width: int, crop: float = 0.875) -> View:
    """The evaluation view: the central square whose side is `crop` of the shorter one."""
    side = max(1, round(min(height, width) * crop))
    return View(((height - side) // 2, (width - side) // 2, side, side), hflip=False)


def to_chw(pixels: NDArray[np.uint8]) -> Tensor:
    """Pixels [N, S, S, 3] as a tensor [N, 3, S, S] over the same memory.

    The channels stay where the decoder put them (torch's channels_last): moving them costs a worker more than reading
    a record, and an accelerator nothing.
    """
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def encode_jpeg(pixels: NDArray[np.uint8], quality: int) -> bytes:
    """The JPEG that the webdataset store keeps; without chroma subsampling, so that only quantisation is lost."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def view_of_epoch(index: NDArray[np.int64] | int, epoch: int, views: int) -> int:
    """Which view sample `index` shows in `epoch`: every one once in `views` epochs, starting at another for each."""
    return (int(index) * 0x9E3779B1 + epoch) % views


def _central_box(config: ViewConfig, height: int, width: int) -> tuple[int, int, int, int]:
    ratio = min(max(width / height, config.ratio[0]), config.ratio[1])
    w = max(1, min(width, round(height * ratio)))
    h = max(1, min(height, round(width / ratio)))
    return (height - h) // 2, (width - w) // 2, h, w
