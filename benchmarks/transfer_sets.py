"""Two small labelled data sets that are not photos of Imagenette: handwritten digits, and crops of COCO's objects.

    python -m benchmarks.transfer_sets COCO OUTPUT

COCO holds instances_{train,val}2017.json and images/{train,val}2017. Writes PNGs of 96 × 96 pixels in class folders,
OUTPUT/{digits,objects}/{train,val}/CLASS. Students of Imagenette are measured on them: `ablate.transfer`.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.data.decoding import decode

SIDE = 96  # pixels
_SMALLEST = 24  # pixels of an object's shorter side
_MARGIN = 1.1  # side of a crop over the object's longer side
# The groups of COCO's categories: the last id of each, in ascending order.
GROUPS = {
    1: "person", 9: "vehicle", 15: "outdoor", 25: "animal", 33: "accessory", 43: "sports", 51: "kitchen", 61: "food",
    70: "furniture", 77: "electronic", 82: "appliance", 90: "indoor",
}  # fmt: skip

Labelled = tuple[str, str, Image.Image]  # split, class, picture


def digits() -> Iterator[Labelled]:
    """scikit-learn's 1,797 scans of 8 × 8 pixels from 0 to 16; every fifth is for validation."""
    bunch = load_digits()
    for number, (scan, digit) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        yield "val" if number % 5 == 0 else "train", str(digit), Image.fromarray(np.uint8(scan * 255 / 16))


def objects(coco: Path) -> Iterator[Labelled]:
    """A square around each object of 24 pixels or more; black where it reaches beyond the photo."""
    for split in ("train", "val"):
        content = json.loads((coco / f"instances_{split}2017.json").read_text(encoding="utf-8"))
        files = {image["id"]: image["file_name"] for image in content["images"]}
        for annotation in content["annotations"]:
            x, y, width, height = annotation["bbox"]
            if annotation.get("iscrowd") or min(width, height) < _SMALLEST:
                continue
            photo = decode((coco / "images" / f"{split}2017" / files[annotation["image_id"]]).read_bytes())
            half, column, row = max(width, height) * _MARGIN / 2, x + width / 2, y + height / 2
            crop = photo.crop(tuple(map(round, (column - half, row - half, column + half, row + half))))
            yield split, GROUPS[min(last for last in GROUPS if last >= annotation["category_id"])], crop


def write(pictures: Iterator[Labelled], folder: Path) -> int:
    """Write the pictures into class folders; how many there are."""
    count = 0
    for count, (split, name, picture) in enumerate(pictures, 1):
        place = folder / split / name
        place.mkdir(parents=True, exist_ok=True)
        picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(place / f"{count:05d}.png")
    return count


def main(coco: Path, output: Path) -> None:
    """Write both data sets."""
    for name, pictures in (("digits", digits()), ("objects", objects(coco))):
        print(f"{output / name}: {write(pictures, output / name)} pictures")  # noqa: T201 - it is a command


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
