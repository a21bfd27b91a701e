"""`mrmae benchmark decode`: JPEG decoders on these very files: how fast, and whether they give the same pixels. JSON.

    mrmae benchmark decode data.path=/data/imagenet/train

Decoding, not the disk: the files are read first. One thread; the decoders take turns. `ours` is what both stages call:
simplejpeg for plain colour JPEGs, Pillow for everything else, and the result as Pillow's image object.
"""

import io
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL
import simplejpeg
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torchvision.io import ImageReadMode, decode_jpeg

from pipeline.config import Config
from pipeline.data.decoding import decode
from pipeline.data.images import DataConfig, open_images

Pixels = NDArray[np.uint8]


class BenchmarkDecodeConfig(Config):
    """What is measured. The defaults take about half a minute."""

    data: DataConfig
    images: int = Field(256, ge=1)  # evenly spread over the whole
    rounds: int = Field(9, ge=1)  # medians over the rounds' own ratios


def run(config: BenchmarkDecodeConfig) -> dict[str, Any]:
    """Measure; for each decoder images/s, its speed over Pillow's, and how many images it gave Pillow's pixels for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    source = open_images(config.data.path, min(config.images, config.data.limit or config.images))
    files = [source.read(index) for index in range(len(source))]
    files = [file for file in files if file[:2] == b"\xff\xd8"]
    decoders: dict[str, Callable[[bytes], Any]] = {
        "pillow": _pillow,
        "simplejpeg": simplejpeg.decode_jpeg,
        "torchvision": _torchvision,
        "ours": decode,
    }
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(config.rounds + 1):
        for name, decoder in decoders.items():
            began = time.perf_counter()
            for file in files:
                decoder(file)
            seconds[name].append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    figures: dict[str, Any] = {}
    for name, decoder in decoders.items():
        rounds = list(zip(seconds["pillow"][1:], seconds[name][1:], strict=True))  # the first warms up
        ratios = [pillow / own for pillow, own in rounds]
        same = sum(np.array_equal(_pillow(file), np.asarray(decoder(file))) for file in files)
        figures[name] = {
            "images_per_s": len(files) / statistics.median(own for _, own in rounds),
            "over_pillow": round(statistics.median(ratios), 3),
            "range": [round(min(ratios), 3), round(max(ratios), 3)],
            "same_pixels": same,
        }
    versions = {
        "pillow": PIL.__version__,
        "simplejpeg": simplejpeg.__version__,
        "torchvision": torchvision.__version__,
    }
    return {"jpegs": len(files), "versions": versions, "decoders": figures}


def _pillow(data: bytes) -> Pixels:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def _torchvision(data: bytes) -> Pixels:
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it is announced to go; measured as long as it is there
        pixels: Pixels = decode_jpeg(encoded, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()
    return pixels
