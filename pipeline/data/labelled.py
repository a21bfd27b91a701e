"""Labelled images for fine-tuning and evaluation: decoded, cropped and augmented by (seed, epoch, index) alone."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.data.images import ImageSource, decode
from pipeline.data.loader import Request, load
from pipeline.data.rng import Stream, raw_bits
from pipeline.data.views import ViewConfig, center_view, draw_view, render, to_chw
from pipeline.errors import DataError

Augment = Callable[[Image.Image], Image.Image]


@dataclass
class LabelledBatch:
    """images uint8 [B, 3, S, S], labels int64 [B]."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "LabelledBatch":
        return LabelledBatch(self.images.to(device, non_blocking=True), self.labels.to(device, non_blocking=True))

    def pin_memory(self) -> "LabelledBatch":
        return LabelledBatch(self.images.pin_memory(), self.labels.pin_memory())


class LabelledDataset:
    """Training views when `views` is given (a random resized crop, a flip, then `augment`), else central crops.

    `crop` is the central square's share of the shorter side: 0.875 is 224 out of 256, 1.0 suits images cut already.

    Raises:
        DataError: the source has no labels.
    """

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        *,
        crop: float = 0.875,
        views: ViewConfig | None = None,
        augment: Augment | None = None,
    ) -> None:
        if (source.labels < 0).any():
            unlabelled = source.key(int(np.argmin(source.labels)))
            raise DataError(f"{unlabelled} has no class: give a class-folder tree, or tars with KEY.cls beside KEY.jpg")
        self.source, self.image_size, self.crop = source, image_size, crop
        self.views, self.augment = views, augment

    def __getitems__(self, requests: list[Request]) -> LabelledBatch:
        pixels = np.stack([np.asarray(self._image(epoch, index)) for epoch, index in requests])
        labels = [self.source.label(index) for _, index in requests]
        return LabelledBatch(to_chw(pixels), torch.tensor(labels))

    def _image(self, epoch: int, index: int) -> Image.Image:
        try:
            image = decode(self.source.read(index))
        except DataError as error:
            raise DataError(f"image {self.source.key(index)}: {error}; repair it or take it away") from error
        if self.views is None:
            return render(image, center_view(image.height, image.width, self.crop), self.image_size)
        # A fresh view each epoch: the epoch takes the place of the view's number.
        view = draw_view(self.views, index, epoch, image.height, image.width)
        image = render(image, view, self.image_size)
        return _seeded(self.augment, image, self.views.seed, epoch, index) if self.augment else image


def _seeded(augment: Augment, image: Image.Image, seed: int, epoch: int, index: int) -> Image.Image:
    """Augmentation libraries draw from the global generators: set both, so that a resumed run sees the same image."""
    words: Any = raw_bits(2, Stream.AUGMENT, seed, epoch, index)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]) & 0xFFFFFFFF)
    return augment(image)


def evaluation_batches(
    source: ImageSource, image_size: int, crop: float, workers: int, rank: int = 0, processes: int = 1, batch: int = 128
) -> Iterator[LabelledBatch]:
    """Central crops of every `processes`-th image from `rank` on, in order, the last batch as short as it is."""
    mine = range(rank, len(source), processes)
    requests = [[(0, index) for index in mine[at : at + batch]] for at in range(0, len(mine), batch)]
    return load(LabelledDataset(source, image_size, crop=crop), requests, workers)
