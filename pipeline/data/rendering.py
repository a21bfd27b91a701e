"""Samples to all of their views, from one decoding: what a decode worker of stage 1 does."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import features
from torch import Tensor

from pipeline.configs.data import ViewConfig
from pipeline.data.decoding import decode_pixels
from pipeline.data.images import ImageSource
from pipeline.data.loader import Request
from pipeline.data.slots import Empty
from pipeline.data.views import Picture, encode_jpeg, to_chw
from pipeline.errors import DataError
from pipeline.files import hash_source

JPEG_QUALITY = 95


@dataclass
class RenderedViews:
    """A few samples, all their views.

    Attributes:
        indices: the samples; those in `errors` have zeros everywhere else.
        pixels: uint8 [n, V, 3, S, S], what teacher and student see.
        box: int32 [n, V, 4]; hflip: uint8 [n, V]; source_hash: uint64 [n].
        images: [n][V] JPEG bytes, for the webdataset store alone.
    """

    indices: list[int]
    pixels: Tensor
    box: NDArray[np.int32]
    hflip: NDArray[np.uint8]
    source_hash: NDArray[np.uint64]
    images: list[list[bytes]] | None
    errors: dict[int, str]

    @property
    def readable(self) -> list[int]:
        """Rows of the samples that could be decoded."""
        return [row for row, index in enumerate(self.indices) if index not in self.errors]

    def readable_pixels(self) -> Tensor:
        """uint8 [readable × V, 3, S, S]; no copy when all could be decoded."""
        pixels = self.pixels[self.readable] if self.errors else self.pixels
        return pixels.flatten(0, 1)


class ViewRenderer:
    """Draws and renders all views of a sample from one decoding; an `IndexedDataset`."""

    def __init__(self, source: ImageSource, views: ViewConfig, store_jpeg: bool) -> None:
        self.source, self.views, self.store_jpeg = source, views, store_jpeg

    def __getitems__(self, requests: list[Request], empty: Empty = np.empty) -> RenderedViews:
        n, v, size = len(requests), self.views.count, self.views.image_size
        pixels = empty((n, v, size, size, 3), np.uint8)
        out = RenderedViews(
            indices=[index for _, index in requests],
            pixels=to_chw(pixels.reshape(-1, size, size, 3)).unflatten(0, (n, v)),
            box=np.zeros((n, v, 4), np.int32),
            hflip=np.zeros((n, v), np.uint8),
            source_hash=np.zeros(n, np.uint64),
            images=[[] for _ in range(n)] if self.store_jpeg else None,
            errors={},
        )
        for row, index in enumerate(out.indices):
            try:
                self._render(out, row, index, pixels[row])
            except DataError as error:
                out.errors[index], pixels[row] = str(error), 0
        return out

    def _render(self, out: RenderedViews, row: int, index: int, pixels: NDArray[np.uint8]) -> None:
        data = self.source.read(index)
        picture = Picture(data, self.views)
        out.source_hash[row] = hash_source(data)
        for number in range(self.views.count):
            view = picture.draw(index, number)
            picture.show(view, pixels[number])
            if out.images is not None:
                # The trainer will decode these bytes, so the teacher must see what they decode to.
                out.images[row].append(encode_jpeg(pixels[number], JPEG_QUALITY))
                decode_pixels(out.images[row][-1], pixels[number])
            out.box[row, number], out.hflip[row, number] = view.box, view.hflip


def preprocessing(views: ViewConfig, store: str) -> dict[str, Any]:
    """What turns encoded bytes into pixels; part of the fingerprint, since another version may give other pixels."""
    return {
        "decoder": f"simplejpeg {simplejpeg.__version__}, pillow {PIL.__version__}",
        "libjpeg": str(features.version_feature("libjpeg_turbo") or features.version("jpg")),
        "orientation": "exif",
        "interpolation": "bicubic" if views.interpolation == "pillow" else f"bicubic, torch {torch.__version__}",
        "image_size": views.image_size,
        "jpeg": f"quality {JPEG_QUALITY}, 4:4:4" if store == "webdataset" else None,
    }
