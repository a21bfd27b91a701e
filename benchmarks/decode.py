"""JPEG decoders on your own images.

Gives images/s, and whether the decoders' pixels agree:

    mrmae benchmark decode data.path=/data/imagenet/train

The lanes are Pillow, simplejpeg, torchvision, and `ours`: what both stages call, which is simplejpeg for plain colour
JPEGs, Pillow for everything else, and the result as Pillow's image object. One thread. `over_pillow` is the speed over
Pillow's; `same_pixels` counts the images with Pillow's pixels.

Reads images (data.path) into memory before it measures, writes nothing. Costs half a minute.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torchvision.io import ImageReadMode, decode_jpeg

from benchmarks.configs.decode import BenchmarkDecodeConfig
from benchmarks.harness import by_turns, open_bench
from pipeline.data.decoding import decode, open_image
from pipeline.data.images import open_images

Pixels = NDArray[np.uint8]


def run(config: BenchmarkDecodeConfig) -> dict[str, Any]:
    """Measure; returns JSON-able figures by decoder."""
    source = open_images(config.data.path, min(config.images, config.data.limit or config.images))
    files = [source.read(index) for index in range(len(source))]
    jpegs = [file for file in files if file[:2] == b"\xff\xd8"]
    decoders: dict[str, Callable[[bytes], Any]] = {
        "pillow": _pillow,
        "simplejpeg": simplejpeg.decode_jpeg,
        "torchvision": _torchvision,
        "ours": decode,
    }
    with open_bench(device="cpu", threads=1) as bench:
        jobs = {name: partial(_decode_all, decoder, jpegs) for name, decoder in decoders.items()}
        rounds = by_turns(bench.lanes(jobs), config.rounds)
        rates = rounds.rates(len(jpegs))
        figures = {}
        for name, decoder in decoders.items():
            speed = rounds.ratio("pillow", name)
            figures[name] = {
                "images_per_s": rates[name],
                "over_pillow": speed["ratio"],
                "range": speed["range"],
                "same_pixels": sum(np.array_equal(_pillow(file), np.asarray(decoder(file))) for file in jpegs),
            }
        return bench.report(config, {"jpegs": len(jpegs), "decoders": figures})


def _decode_all(decoder: Callable[[bytes], Any], jpegs: list[bytes]) -> None:
    for jpeg in jpegs:
        decoder(jpeg)


def _pillow(data: bytes) -> Pixels:
    with open_image(data) as image:
        return np.asarray(image.convert("RGB"))


def _torchvision(data: bytes) -> Pixels:
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it is announced to go; measured as long as it is there
        pixels: Pixels = decode_jpeg(encoded, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()
    return pixels
