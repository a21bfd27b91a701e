"""Where an image lies on the detector's square canvas: one record for its pixels, boxes and masks.

Training samples it: large-scale jitter (arXiv 2012.07177), a scale of 0.1 to 2 times the canvas, then a crop of what is
larger. Evaluation fits the longer side. A smaller image lies in the top left corner; the mean colour fills the canvas.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle

from pipeline.configs.detection import JitterConfig
from pipeline.data.rng import Stream, uniforms
from pipeline.detection.coco import Instances
from pipeline.pixels import IMAGENET_MEAN

FILL = tuple(round(255 * mean) for mean in IMAGENET_MEAN)  # about zero once normalised
_SMALLEST = 1.0  # pixels: sides of a box that is still worth training on


@dataclass(frozen=True)
class Placement:
    """The image is scaled, cropped to `size` from `offset` on, mirrored, and laid into the top left corner."""

    scaled: tuple[int, int]  # height, width of the whole image, canvas pixels
    offset: tuple[int, int]  # top, left of the crop in it
    size: tuple[int, int]  # height, width of the part on the canvas
    hflip: bool


def fit(height: int, width: int, canvas: int) -> Placement:
    """The whole image, its longer side as long as the canvas."""
    return _crop(_scaled(height, width, canvas), canvas, (0.0, 0.0), hflip=False)


def sample_placement(
    config: JitterConfig, seed: int, index: int, epoch: int, size: tuple[int, int], canvas: int
) -> Placement:
    """The jitter of sample `index` in `epoch`, an image of `size` (height, width): a function of these numbers."""
    u_scale, u_top, u_left, u_flip = uniforms(4, Stream.VIEW, seed, index, epoch)
    low, high = config.scale
    longer = canvas * (low + u_scale * (high - low))
    return _crop(_scaled(*size, longer), canvas, (u_top, u_left), hflip=bool(u_flip < config.hflip))


def render(image: Image.Image, placement: Placement, canvas: int) -> NDArray[np.uint8]:
    """The canvas, uint8 [3, canvas, canvas], bilinear with antialiasing."""
    pixels = np.empty((canvas, canvas, 3), np.uint8)
    pixels[:] = FILL
    h, w = placement.size
    pixels[:h, :w] = np.asarray(_cut(image, placement))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def place(
    instances: Instances, placement: Placement, canvas: int, *, height: int, width: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.uint8]]:
    """Boxes [N, 4] in canvas pixels, labels [N] and masks [N, canvas, canvas] of the objects that are on the canvas.

    A box that the crop cuts shrinks to the visible part of its mask. Objects of less than a visible pixel are left out.

    Args:
        height, width: of the instances' image.
    """
    masks = [_mask(segment, placement, height, width) for segment in instances.segments]
    boxes = [_box(box, mask, placement, height, width) for box, mask in zip(instances.boxes, masks, strict=True)]
    kept = [i for i, b in enumerate(boxes) if min(b[2] - b[0], b[3] - b[1]) >= _SMALLEST and masks[i].any()]
    h, w = placement.size
    on_canvas = np.zeros((len(kept), canvas, canvas), np.uint8)
    for row, i in enumerate(kept):
        on_canvas[row, :h, :w] = masks[i]
    return np.array([boxes[i] for i in kept], dtype=np.float32).reshape(-1, 4), instances.labels[kept], on_canvas


def as_mask(segment: Any, height: int, width: int) -> NDArray[np.uint8]:
    """Polygons or an RLE (compressed or not) → uint8 [height, width]."""
    if isinstance(segment, dict):
        counts = segment["counts"]
        encoded = rle.frPyObjects(segment, height, width) if isinstance(counts, list) else segment
    else:
        encoded = rle.merge(rle.frPyObjects(segment, height, width))
    decoded: NDArray[np.uint8] = rle.decode(encoded)
    return decoded


def _scaled(height: int, width: int, longer: float) -> tuple[int, int]:
    factor = longer / max(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def _crop(scaled: tuple[int, int], canvas: int, shift: tuple[float, float], hflip: bool) -> Placement:
    size = (min(scaled[0], canvas), min(scaled[1], canvas))
    offset = (int(shift[0] * (scaled[0] - size[0] + 1)), int(shift[1] * (scaled[1] - size[1] + 1)))
    return Placement(scaled, offset, size, hflip)


def _cut(image: Image.Image, placement: Placement) -> Image.Image:
    """Scale only what the crop shows."""
    (top, left), (h, w) = placement.offset, placement.size
    sy, sx = image.height / placement.scaled[0], image.width / placement.scaled[1]
    box = (left * sx, top * sy, min((left + w) * sx, image.width), min((top + h) * sy, image.height))
    cut = image.resize((w, h), Image.Resampling.BILINEAR, box=box)
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if placement.hflip else cut


def _mask(segment: Any, placement: Placement, height: int, width: int) -> NDArray[np.uint8]:
    """[h, w] of the crop. Polygons are drawn at the canvas' scale; an RLE is scaled as the image is."""
    if isinstance(segment, dict):
        scaled = _cut(Image.fromarray(as_mask(segment, height, width) * 255), placement)
        return (np.asarray(scaled) > 127).astype(np.uint8)
    h, w = placement.size
    moved = [_move(np.array(polygon).reshape(-1, 2), placement, height, width).ravel().tolist() for polygon in segment]
    return as_mask(moved, h, w)


def _box(
    box: NDArray[np.float64], mask: NDArray[np.uint8], placement: Placement, height: int, width: int
) -> NDArray[np.float64]:
    corners = _move(box.reshape(2, 2), placement, height, width)
    corners = np.stack([corners.min(0), corners.max(0)])  # mirroring swaps left and right
    h, w = placement.size
    inside = np.clip(corners, 0, (w, h))
    if np.allclose(inside, corners, atol=0.5) or not mask.any():
        return inside.ravel()
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    extent = np.array([[columns[0], rows[0]], [columns[-1] + 1, rows[-1] + 1]])
    return np.stack([np.maximum(inside[0], extent[0]), np.minimum(inside[1], extent[1])]).ravel()


def _move(points: NDArray[np.float64], placement: Placement, height: int, width: int) -> NDArray[np.float64]:
    """Points [n, 2] (x, y) of the image → of the canvas, possibly beyond the crop."""
    scale = np.array([placement.scaled[1] / width, placement.scaled[0] / height])
    moved: NDArray[np.float64] = points * scale - np.array([placement.offset[1], placement.offset[0]])
    if placement.hflip:
        moved[:, 0] = placement.size[1] - moved[:, 0]
    return moved
