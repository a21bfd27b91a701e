"""Annotated images in COCO's format: a folder of images and one JSON file of boxes and masks.

    coco = open_coco(Path("coco/val2017"), Path("coco/annotations/instances_val2017.json"))
    coco.read(7), coco.instances(7), coco.categories

The file is read once, checked, and kept in flat arrays, which worker processes share: as Python objects, COCO's 860,000
annotations would be gigabytes in each.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import xxhash
from annotated_types import Len
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from pipeline.config import Config, PathField
from pipeline.errors import DataError

log = logging.getLogger(__name__)

_FAR = 10  # sides of the image; tools do draw polygons that leave it a little
_POINTS = 3  # a polygon of fewer has no area, and pycocotools takes two points for a box


class CocoConfig(Config):
    """Annotated images."""

    images: PathField  # the folder that file names are relative to
    annotations: PathField  # instances_*.json
    limit: int | None = Field(None, gt=0)  # at most so many images, evenly spread over the whole


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


_Id = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # kept as int64
_Side = Annotated[int, Field(gt=0, lt=2**31)]  # pixels


class _Image(_Record):
    id: _Id
    file_name: str
    height: _Side
    width: _Side


class _Category(_Record):
    id: _Id
    name: str


class _Rle(_Record):
    size: Annotated[list[int], Len(2, 2)]  # height, width
    counts: str | list[int]


class _Annotation(_Record):
    id: _Id
    image_id: _Id
    category_id: _Id
    bbox: Annotated[list[FiniteFloat], Len(4, 4)]  # left, top, width, height
    area: FiniteFloat | None = None
    iscrowd: int = Field(0, ge=0, le=1)
    segmentation: _Rle | list[list[FiniteFloat]]


@dataclass(frozen=True)
class Instances:
    """The objects of one image that a detector can learn from.

    Attributes:
        boxes: float64 [N, 4] (x1, y1, x2, y2) in pixels, inside the image.
        labels: int64 [N], from 1.
        segments: N times polygons ([x, y, x, y, ...] each) or an RLE.
    """

    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    segments: list[Any]


@dataclass(frozen=True, eq=False)
class CocoImages:
    """Images by index, ascending by id, and their annotations, grouped by image."""

    folder: Path
    files: NDArray[np.bytes_]  # [N] UTF-8 names
    ids: NDArray[np.int64]  # [N]
    sizes: NDArray[np.int64]  # [N, 2] height, width
    categories: tuple[tuple[int, str], ...]  # (id, name), ascending by id; the label is the place, from 1
    first: NDArray[np.int64]  # [N + 1]: image i has the annotations first[i] to first[i + 1] - 1
    annotation_ids: NDArray[np.int64]  # [M]
    labels: NDArray[np.int64]  # [M]
    boxes: NDArray[np.float64]  # [M, 4] left, top, width, height, as annotated
    areas: NDArray[np.float64]  # [M] pixels
    crowd: NDArray[np.bool_]  # [M]: a region of many objects; never learnt from, ignored in evaluation
    degenerate: NDArray[np.bool_]  # [M]: no area, or beyond the image; never learnt from
    segments: NDArray[np.uint8]  # JSON of all segmentations
    segment_ends: NDArray[np.int64]  # [M]
    digest: str  # xxh3-128 of the annotation file and the limit

    def __len__(self) -> int:
        return len(self.ids)

    def name(self, index: int) -> str:
        return bytes(self.files[index]).decode()

    def size(self, index: int) -> tuple[int, int]:
        """(height, width)."""
        height, width = self.sizes[index]
        return int(height), int(width)

    def read(self, index: int) -> bytes:
        """The encoded image. Raises DataError if it isn't there."""
        try:
            return (self.folder / self.name(index)).read_bytes()
        except OSError as error:
            raise DataError(f"image {self.folder / self.name(index)}: {error.strerror or error}") from error

    def instances(self, index: int) -> Instances:
        """What can be learnt from an image: no crowds, nothing degenerate; an image may have none."""
        rows = np.arange(self.first[index], self.first[index + 1])
        rows = rows[~self.crowd[rows] & ~self.degenerate[rows]]
        boxes = _inside(self.boxes[rows], self.sizes[index : index + 1])
        return Instances(boxes, self.labels[rows], [self._segment(row) for row in rows])

    def to_coco(self, *, masks: bool = False) -> dict[str, Any]:
        """The annotations as pycocotools takes them, crowds included; new objects, for it changes them.

        With `masks` only those that it can make a mask of; boxes are scored of the others too.
        """
        image_of = np.repeat(self.ids, np.diff(self.first))
        annotations = [
            {
                "id": int(self.annotation_ids[row]),
                "image_id": int(image_of[row]),
                "category_id": self.categories[self.labels[row] - 1][0],
                "bbox": self.boxes[row].tolist(),
                "area": float(self.areas[row]),
                "iscrowd": int(self.crowd[row]),
                "segmentation": segment,
            }
            for row in range(len(self.labels))
            if (segment := self._segment(row)) or not masks
        ]
        sizes = zip(self.ids.tolist(), self.sizes.tolist(), strict=True)
        images = [{"id": id_, "height": height, "width": width} for id_, (height, width) in sizes]
        return {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": id_, "name": name} for id_, name in self.categories],
        }

    def _segment(self, row: int) -> Any:
        start = self.segment_ends[row - 1] if row else 0
        return json.loads(self.segments[start : self.segment_ends[row]].tobytes())


def open_coco(folder: Path, annotations: Path, limit: int | None = None) -> CocoImages:
    """Read an annotation file; with `limit`, only so many of its images, evenly spread.

    Degenerate annotations are counted in a warning. Images without annotations stay: they teach what is no object.

    Raises:
        DataError: no such folder or file; no JSON; an image, category or annotation that isn't what COCO's format says,
            named by its id.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images")
    text = _read(annotations)
    content = _parse(text, annotations)
    categories = _by_id(_records(content, "categories", _Category, annotations), "category", annotations)
    images = _by_id(_records(content, "images", _Image, annotations), "image", annotations)
    if not images or not categories:
        raise DataError(f"{annotations}: no {'categories' if images else 'images'} in it")
    rows = _rows(_records(content, "annotations", _Annotation, annotations), images, categories, annotations)
    ids = sorted(images)
    if limit is not None and limit < len(ids):
        ids = [ids[place * len(ids) // limit] for place in range(limit)]
    digest = xxhash.xxh3_128_hexdigest(text + f" {limit}".encode())
    return _gather(folder, [images[id_] for id_ in ids], categories, rows, digest)


@dataclass(frozen=True)
class _Row:
    """One checked annotation, without the objects that it was read from."""

    id: int
    label: int
    box: list[float]
    area: float
    crowd: bool
    segment: bytes  # JSON


def _rows(
    records: Iterator[_Annotation], images: Mapping[int, _Image], categories: Mapping[int, _Category], file: Path
) -> dict[int, list[_Row]]:
    """Image id → its annotations, in the order of the file."""
    rows: dict[int, list[_Row]] = {id_: [] for id_ in images}
    labels = {id_: place + 1 for place, id_ in enumerate(sorted(categories))}
    seen: set[int] = set()
    for record in records:
        problem = _problem(record, images, labels, seen)
        if problem:
            raise DataError(f"{file}: annotation {record.id}: {problem}; mend it or take it away")
        seen.add(record.id)
        area = record.bbox[2] * record.bbox[3] if record.area is None else record.area
        segment = json.dumps(_usable(record.segmentation)).encode()
        rows[record.image_id].append(
            _Row(record.id, labels[record.category_id], record.bbox, area, bool(record.iscrowd), segment)
        )
    return rows


def _problem(record: _Annotation, images: Mapping[int, _Image], labels: Mapping[int, int], seen: set[int]) -> str:
    """What is wrong with an annotation beyond its types; "" if nothing is."""
    if record.id in seen:
        return "the id is there twice"
    if record.image_id not in images:
        return f"image_id {record.image_id} is not among the images"
    if record.category_id not in labels:
        return f"category_id {record.category_id} is not among the categories"
    segment = record.segmentation
    image = images[record.image_id]
    if not isinstance(segment, _Rle):
        if any(len(polygon) % 2 for polygon in segment):
            return "segmentation: a polygon has an odd number of coordinates"
        reach = _FAR * max(image.height, image.width)  # pycocotools walks along every edge, pixel by pixel
        ends = [end(polygon, default=0.0) for polygon in segment for end in (min, max)]
        far = max(ends, key=abs, default=0.0)
        return f"segmentation: a polygon goes to {far:g}, far outside its image" if abs(far) > reach else ""
    if segment.size != [image.height, image.width]:
        return f"segmentation: its size {segment.size} is not the image's, [{image.height}, {image.width}]"
    counts = segment.counts if isinstance(segment.counts, list) else _decompressed(segment.counts)
    if counts is None:
        return "segmentation: its counts are no compressed RLE"
    if min(counts, default=0) < 0:
        return "segmentation: one of its counts is negative"
    if sum(counts) != image.height * image.width:
        return "segmentation: its counts don't add up to the pixels of the image"
    return ""


def _decompressed(text: str) -> list[int] | None:
    """The run lengths that COCO's string of an RLE stands for; None where it stands for none.

    A character is 48 + six bits: five of the number, lowest first, and one that says that it goes on. The highest bit
    of a number is its sign, and from the fourth on it is the difference to the one before the last.
    """
    counts: list[int] = []
    value = shift = 0
    for code in text.encode():
        bits = code - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return None if shift else counts


def _usable(segmentation: _Rle | list[list[float]]) -> Any:
    if isinstance(segmentation, _Rle):
        return {"size": segmentation.size, "counts": segmentation.counts}
    return [polygon for polygon in segmentation if len(polygon) >= 2 * _POINTS]


def _inside(boxes: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    """[N, 4] left, top, width, height → x1, y1, x2, y2, cut at the edges of images of `sizes` [N or 1, 2]."""
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    limits = sizes[:, [1, 0, 1, 0]]
    clipped: NDArray[np.float64] = np.clip(corners, 0, limits)
    return clipped


def _gather(
    folder: Path,
    images: Sequence[_Image],
    categories: Mapping[int, _Category],
    rows: Mapping[int, list[_Row]],
    digest: str,
) -> CocoImages:
    chosen = [row for image in images for row in rows[image.id]]
    counts = [len(rows[image.id]) for image in images]
    sizes = np.array([[image.height, image.width] for image in images], dtype=np.int64)
    boxes = np.array([row.box for row in chosen], dtype=np.float64).reshape(-1, 4)
    inside = _inside(boxes, np.repeat(sizes, counts, axis=0))
    empty = np.array([row.segment == b"[]" for row in chosen], dtype=np.bool_)
    degenerate = empty | (inside[:, 2:] <= inside[:, :2]).any(1)
    if degenerate.any():
        log.warning(
            "%s: %d annotations have no area inside their image (the first is %d): none is trained on",
            folder, degenerate.sum(), chosen[int(degenerate.argmax())].id,
        )  # fmt: skip
    return CocoImages(
        folder=folder,
        files=np.array([image.file_name.encode() for image in images]),
        ids=np.array([image.id for image in images], dtype=np.int64),
        sizes=sizes,
        categories=tuple((id_, categories[id_].name) for id_ in sorted(categories)),
        first=np.cumsum([0, *counts], dtype=np.int64),
        annotation_ids=np.array([row.id for row in chosen], dtype=np.int64),
        labels=np.array([row.label for row in chosen], dtype=np.int64),
        boxes=boxes,
        areas=np.array([row.area for row in chosen], dtype=np.float64),
        crowd=np.array([row.crowd for row in chosen], dtype=np.bool_),
        degenerate=degenerate,
        segments=np.frombuffer(b"".join(row.segment for row in chosen), dtype=np.uint8),
        segment_ends=np.cumsum([len(row.segment) for row in chosen], dtype=np.int64),
        digest=digest,
    )


R = TypeVar("R", _Image, _Category, _Annotation)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}; give a COCO annotation file") from error


def _parse(text: bytes, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"{file} is no JSON ({error}): fetch or export it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} holds no keys and values: give an instances file in COCO's format")
    return content


def _records(content: dict[str, Any], key: str, cls: type[R], file: Path) -> Iterator[R]:
    """Checked entries of one of the file's lists."""
    entries = content.get(key)
    if not isinstance(entries, list):
        raise DataError(f"{file}: no list of {key} in it: give an instances file in COCO's format")
    for number, entry in enumerate(entries):
        try:
            yield cls.model_validate(entry)
        except ValidationError as error:
            kind = cls.__name__.strip("_").lower()
            name = entry["id"] if isinstance(entry, dict) and "id" in entry else f"number {number + 1}, without an id"
            problem = error.errors()[0]
            key_path = ".".join(str(part) for part in problem["loc"][:1])
            said = f"{problem['msg'][0].lower()}{problem['msg'][1:]}"
            told = f"{key_path}: {said}" if key_path else said
            raise DataError(f"{file}: {kind} {name}: {told}; mend it or take it away") from error


def _by_id(records: Iterator[R], kind: str, file: Path) -> dict[int, R]:
    found: dict[int, R] = {}
    for record in records:
        if record.id in found:
            raise DataError(f"{file}: {kind} {record.id}: the id is there twice; take one away")
        found[record.id] = record
    return found
