"""Batches of annotated images for a detector: jittered by (seed, epoch, index) alone, or fitted for evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.configs.detection import JitterConfig
from pipeline.data.decoding import decode
from pipeline.data.loader import Request
from pipeline.data.slots import Empty
from pipeline.detection.coco import CocoImages
from pipeline.detection.placement import fit, place, render, sample_placement
from pipeline.errors import DataError, naming_image


@dataclass
class DetectionBatch:
    """One micro-batch.

    Attributes:
        images: uint8 [B, 3, S, S], each in the top left corner of its canvas.
        sizes: (height, width) of what is image on each canvas.
        original_sizes: of the files.
        targets: boxes float32 [N, 4] (x1, y1, x2, y2) in canvas pixels, labels int64 [N] and masks uint8 [N, S, S] for
            each image; empty in evaluation.
        indices: of the images.
    """

    images: Tensor
    sizes: list[tuple[int, int]]
    original_sizes: list[tuple[int, int]]
    targets: list[dict[str, Tensor]]
    indices: list[int]

    def to(self, device: torch.device) -> "DetectionBatch":
        moved = [{key: value.to(device, non_blocking=True) for key, value in target.items()} for target in self.targets]
        return replace(self, images=self.images.to(device, non_blocking=True), targets=moved)


class DetectionDataset:
    """Training canvases and their targets; without `jitter`, canvases to detect on.

    Args:
        canvas: S, pixels.
        seed: of the jitter.
    """

    def __init__(self, coco: CocoImages, canvas: int, *, jitter: JitterConfig | None = None, seed: int = 0) -> None:
        self.coco, self.canvas, self.jitter, self.seed = coco, canvas, jitter, seed

    def __getitems__(self, requests: list[Request], empty: Empty = np.empty) -> DetectionBatch:
        pixels = empty((len(requests), 3, self.canvas, self.canvas), np.uint8)
        sizes, targets = [], []
        for row, (epoch, index) in enumerate(requests):
            image = self._image(index)
            side = {"height": image.height, "width": image.width}
            with naming_image(self.coco.key(index), "mend its annotations, or change jitter.*"):
                if self.jitter is None:
                    placement = fit(**side, canvas=self.canvas)
                else:
                    placement = sample_placement(
                        self.jitter, self.seed, index, epoch, (image.height, image.width), self.canvas
                    )
                    boxes, labels, masks = place(self.coco.instances(index), placement, self.canvas, **side)
                    arrays = {"boxes": boxes, "labels": labels, "masks": masks}
                    targets.append({key: torch.from_numpy(value) for key, value in arrays.items()})
                pixels[row] = render(image, placement, self.canvas)
            sizes.append(placement.size)
        indices = [index for _, index in requests]
        originals = [self.coco.size(index) for index in indices]
        return DetectionBatch(torch.from_numpy(pixels), sizes, originals, targets, indices)

    def _image(self, index: int) -> Image.Image:
        name, data = self.coco.key(index), self.coco.read(index)
        try:
            image = decode(data)
        except DataError as error:
            raise DataError(f"image {name}: {error}; repair it or take it away") from error
        if (image.height, image.width) != self.coco.size(index):
            height, width = self.coco.size(index)
            raise DataError(
                f"image {name} has {image.width} × {image.height} pixels, its annotation says {width} × {height}: "
                "its boxes would not fit; restore the image or mend the annotation file"
            )
        return image


def canvases(images: Sequence[Image.Image], canvas: int) -> DetectionBatch:
    """Any RGB images, without annotations, as a batch to detect on."""
    placements = [fit(image.height, image.width, canvas) for image in images]
    pixels = [render(image, placement, canvas) for image, placement in zip(images, placements, strict=True)]
    originals = [(image.height, image.width) for image in images]
    sizes = [placement.size for placement in placements]
    return DetectionBatch(torch.from_numpy(np.stack(pixels)), sizes, originals, [], list(range(len(images))))
