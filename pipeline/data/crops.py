"""Central crops of images of any kind; one that can't be read is named, and stops nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from pipeline.data.decoding import decode
from pipeline.data.loader import Request
from pipeline.data.slots import Empty
from pipeline.data.views import center_view, render, to_chw
from pipeline.errors import DataError


class EncodedImages(Protocol):
    """Encoded images by index, such as an `ImageSource`."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str: ...

    def read(self, index: int) -> bytes:
        """The bytes. Raises DataError if they aren't there."""


class ImageFiles:
    """Single files, by the paths that a user gave; `EncodedImages`."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def key(self, index: int) -> str:
        return str(self._paths[index])

    def read(self, index: int) -> bytes:
        try:
            return self._paths[index].read_bytes()
        except OSError as error:
            raise DataError(f"image {self.key(index)}: {error.strerror or error}") from error


@dataclass
class CropBatch:
    """images uint8 [B, 3, S, S], zeros where one can't be read; faults: index → why not."""

    images: Tensor
    faults: dict[int, str]


class CentralCrops:
    """Central crops; an `IndexedDataset`.

    `crop` is the central square's share of the shorter side: 0.875 is 224 out of 256, 1.0 suits images cut already.
    """

    def __init__(self, source: EncodedImages, image_size: int, crop: float = 0.875) -> None:
        self.source, self.image_size, self.crop = source, image_size, crop

    def __getitems__(self, requests: list[Request], empty: Empty = np.empty) -> CropBatch:
        pixels = empty((len(requests), self.image_size, self.image_size, 3), np.uint8)
        faults = {}
        for row, (_, index) in enumerate(requests):
            try:
                image = decode(self.source.read(index))
            except DataError as error:
                faults[index] = str(error).removeprefix(f"image {self.source.key(index)}: ")
                pixels[row] = 0
                continue
            view = center_view(image.height, image.width, self.crop)
            pixels[row] = np.asarray(render(image, view, self.image_size))
        return CropBatch(to_chw(pixels), faults)
