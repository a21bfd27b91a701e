"""A small annotated data set in COCO's format: coloured rectangles, with every kind of annotation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle

CATEGORIES = [
    {"id": 90, "name": "red"},
    {"id": 3, "name": "green"},
    {"id": 7, "name": "blue"},
]  # neither dense nor sorted
_COLOURS = {90: (220, 30, 30), 3: (30, 200, 30), 7: (40, 40, 230)}
# (category, left, top, width, height) in each of four images of 96 × 64 pixels; the third is empty
SCENES = [
    [(90, 8, 8, 32, 40), (3, 52, 12, 36, 36)],
    [(7, 20, 10, 50, 44)],
    [],
    [(3, 4, 20, 30, 30), (7, 40, 6, 24, 30), (90, 66, 30, 26, 28)],
]
HEIGHT, WIDTH = 64, 96


def scene_annotations() -> dict[str, Any]:
    """Ids run against the order of the file; masks are polygons, RLE and uncompressed RLE by turns."""
    images, annotations = [], []
    for place, scene in enumerate(SCENES):
        images.append({"id": 40 - place, "file_name": f"{place}.png", "height": HEIGHT, "width": WIDTH})
        for category, x, y, w, h in scene:
            number = len(annotations)
            annotations.append(
                {
                    "id": 500 - number,
                    "image_id": 40 - place,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": (polygon, compressed, uncompressed)[number % 3](x, y, w, h),
                }
            )
    return {"images": images, "annotations": annotations, "categories": [dict(one) for one in CATEGORIES]}


def polygon(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def rectangle(x: int, y: int, w: int, h: int) -> Any:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y : y + h, x : x + w] = 1
    return mask


def compressed(x: int, y: int, w: int, h: int) -> dict[str, Any]:
    encoded = rle.encode(np.asfortranarray(rectangle(x, y, w, h)))
    return {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}


def uncompressed(x: int, y: int, w: int, h: int) -> dict[str, Any]:
    pixels = rectangle(x, y, w, h).ravel(order="F")
    changes = np.flatnonzero(np.diff(pixels, prepend=0))
    return {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *changes, len(pixels)]).tolist()}


def write_coco(root: Path, content: dict[str, Any] | None = None) -> tuple[Path, Path]:
    """Write images and annotations (those of `scene_annotations` unless given); returns folder and file."""
    folder = root / "images"
    folder.mkdir(parents=True)
    for place, scene in enumerate(SCENES):
        pixels = np.random.default_rng(place).integers(90, 130, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        for category, x, y, w, h in scene:
            pixels[y : y + h, x : x + w] = _COLOURS[category]
        Image.fromarray(pixels).save(folder / f"{place}.png")
    file = root / "instances.json"
    file.write_text(json.dumps(content or scene_annotations()))
    return folder, file
