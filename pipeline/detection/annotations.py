"""COCO's annotation file: read once and checked; an error names the entry by its id."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from annotated_types import Len
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from pipeline.errors import DataError, wanted

_FAR = 10  # sides of the image; tools do draw polygons that leave it a little
_SEGMENTATION = "must be a list of polygons, [[x1, y1, x2, y2, x3, y3, ...], ...], or an RLE of size and counts"
_POINTS = 3  # a polygon of fewer has no area, and pycocotools takes two points for a box


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


_Id = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # kept as int64
_Side = Annotated[int, Field(gt=0, lt=2**31)]  # pixels


class ImageEntry(_Entry):
    id: _Id
    file_name: str
    height: _Side
    width: _Side


class CategoryEntry(_Entry):
    id: _Id
    name: str


class RleEntry(_Entry):
    size: Annotated[list[int], Len(2, 2)]  # height, width
    counts: str | list[int]


class AnnotationEntry(_Entry):
    id: _Id
    image_id: _Id
    category_id: _Id
    bbox: Annotated[list[FiniteFloat], Len(4, 4)]  # left, top, width, height
    area: FiniteFloat | None = None
    iscrowd: int = Field(0, ge=0, le=1)
    segmentation: RleEntry | list[list[FiniteFloat]] = []  # empty: a box alone


class Row(NamedTuple):
    """One checked annotation, without the objects that it was read from."""

    id: int
    label: int
    box: list[float]
    area: float
    crowd: bool
    segment: bytes  # JSON
    has_box_alone: bool  # no mask was annotated


class Annotations(NamedTuple):
    """What an annotation file holds, by id; the rows of an image are in the order of the file."""

    images: dict[int, ImageEntry]
    categories: dict[int, CategoryEntry]
    rows: dict[int, list[Row]]
    content: bytes


def read_annotations(file: Path) -> Annotations:
    """Read and check an annotation file.

    Raises:
        DataError: no such file, no JSON, or an image, category or annotation that isn't in COCO's format.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}; give a COCO annotation file") from error
    try:
        lists = json.loads(content)
    except ValueError as error:
        raise DataError(f"{file} is no JSON ({error}): fetch or export it again") from error
    if not isinstance(lists, dict):
        raise DataError(f"{file} holds no keys and values: give an instances file in COCO's format")
    categories = _by_id(_entries(lists, "categories", CategoryEntry, file), "category", file)
    images = _by_id(_entries(lists, "images", ImageEntry, file), "image", file)
    if not images or not categories:
        raise DataError(f"{file}: no {'categories' if images else 'images'} in it")
    return Annotations(images, categories, _rows(lists, images, categories, file), content)


def _rows(
    lists: dict[str, Any], images: Mapping[int, ImageEntry], categories: Mapping[int, CategoryEntry], file: Path
) -> dict[int, list[Row]]:
    rows: dict[int, list[Row]] = {id_: [] for id_ in images}
    labels = {id_: place + 1 for place, id_ in enumerate(sorted(categories))}
    ids: set[int] = set()
    for record in _entries(lists, "annotations", AnnotationEntry, file):
        problem = _problem(record, images, labels, ids)
        if problem:
            raise DataError(f"{file}: annotation {record.id}: {problem}; mend it or take it away")
        ids.add(record.id)
        area = record.bbox[2] * record.bbox[3] if record.area is None else record.area
        segment = json.dumps(_usable(record.segmentation)).encode()
        rows[record.image_id].append(
            Row(
                record.id,
                labels[record.category_id],
                record.bbox,
                area,
                bool(record.iscrowd),
                segment,
                has_box_alone=record.segmentation == [],
            )
        )
    return rows


def _problem(
    record: AnnotationEntry, images: Mapping[int, ImageEntry], labels: Mapping[int, int], ids: set[int]
) -> str:
    """What is wrong with an annotation beyond its types; "" if nothing is. `ids` are those of the entries before it."""
    if record.id in ids:
        return "the id is there twice"
    if record.image_id not in images:
        return f"image_id {record.image_id} is not among the images"
    if record.category_id not in labels:
        return f"category_id {record.category_id} is not among the categories"
    segment = record.segmentation
    image = images[record.image_id]
    if not isinstance(segment, RleEntry):
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
    """The run lengths in COCO's string of an RLE; None if it is no such string.

    A character is 48 + six bits: five of the number, lowest first, and one that is set if it goes on. The highest bit
    of a number is its sign. From the fourth number on, each is the difference to the one two places before.
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


def _usable(segmentation: RleEntry | list[list[float]]) -> Any:
    if isinstance(segmentation, RleEntry):
        return {"size": segmentation.size, "counts": segmentation.counts}
    return [polygon for polygon in segmentation if len(polygon) >= 2 * _POINTS]


E = TypeVar("E", ImageEntry, CategoryEntry, AnnotationEntry)


def _entries(lists: dict[str, Any], key: str, cls: type[E], file: Path) -> Iterator[E]:
    """Checked entries of one of the file's lists."""
    entries = lists.get(key)
    if not isinstance(entries, list):
        raise DataError(f"{file}: no list of {key} in it: give an instances file in COCO's format")
    for number, entry in enumerate(entries):
        try:
            yield cls.model_validate(entry)
        except ValidationError as error:
            kind = cls.__name__.removesuffix("Entry").lower()
            name = entry["id"] if isinstance(entry, dict) and "id" in entry else f"number {number + 1}, without an id"
            problem = error.errors()[0]
            field = "".join(f"{part}: " for part in problem["loc"][:1])
            text = _SEGMENTATION if field == "segmentation: " else wanted(problem)
            raise DataError(f"{file}: {kind} {name}: {field}{text}; mend it or take it away") from error


def _by_id(entries: Iterator[E], kind: str, file: Path) -> dict[int, E]:
    by_id: dict[int, E] = {}
    for entry in entries:
        if entry.id in by_id:
            raise DataError(f"{file}: {kind} {entry.id}: the id is there twice; take one away")
        by_id[entry.id] = entry
    return by_id
