"""Drawn pictures, where a benchmark is to run without data: JPEGs of about a photo's size and cost."""

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.images import ImageSource, open_images


def draw_images(folder: Path, count: int, size: int = 224) -> ImageSource:
    """Write `count` JPEGs of size × size pixels into a new folder, the same ones every time, and list them."""
    folder.mkdir(parents=True)
    for number in range(count):
        _draw(number, size).save(folder / f"{number:05d}.jpg", quality=90)
    return open_images(str(folder))


def _draw(number: int, size: int) -> Image.Image:
    """Coarse and fine structure in a photo's proportions."""
    random = np.random.default_rng(number)
    coarse, fine = (
        Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        for side in (6, size // 2)
    )
    return Image.blend(coarse, fine, 0.15)
