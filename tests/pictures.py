"""Pictures to test with."""

import numpy as np
from PIL import Image


def smooth_picture(seed: int, height: int, width: int) -> Image.Image:
    """A picture with structure at all scales: coarse noise, enlarged."""
    coarse = np.random.default_rng(seed).integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
