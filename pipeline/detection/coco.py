"""Annotated images in COCO's format: a folder of images and one JSON file of boxes and masks.

    coco = open_coco(Path("coco/val2017"), Path("coco/annotations/instances_val2017.json"))
    coco.read(7), coco.instances(7), coco.categories

The file is kept in flat arrays, which worker processes share: as Python objects, COCO's 860,000 annotations would be
gigabytes in each.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.detection.annotations import Annotations, read_annotations
from pipeline.errors import DataError

log = logging.getLogger(__name__)


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
    crowd: NDArray[np.bool_]  # [M]: a region of many objects; not trained on, ignored in evaluation
    degenerate: NDArray[np.bool_]  # [M]: no area, or beyond the image; not trained on
    boxed: NDArray[np.bool_]  # [M]: annotated without a mask
    segments: NDArray[np.uint8]  # JSON of all segmentations
    segment_ends: NDArray[np.int64]  # [M]
    digest: str  # xxh3-128 of the annotation file and the limit

    def __len__(self) -> int:
        return len(self.ids)

    def key(self, index: int) -> str:
        """The file's name, as annotated."""
        return bytes(self.files[index]).decode()

    def size(self, index: int) -> tuple[int, int]:
        """(height, width)."""
        height, width = self.sizes[index]
        return int(height), int(width)

    def read(self, index: int) -> bytes:
        """The encoded image. Raises DataError if it isn't there."""
        try:
            return (self.folder / self.key(index)).read_bytes()
        except OSError as error:
            raise DataError(f"image {self.folder / self.key(index)}: {error.strerror or error}") from error

    def ends(self, index: int, size: int) -> tuple[int, bytes, bytes]:
        """The bytes of an image, and its first and last `size`. Raises DataError if it isn't there."""
        try:
            with open(self.folder / self.key(index), "rb", buffering=0) as file:
                length = os.fstat(file.fileno()).st_size
                return length, os.pread(file.fileno(), size, 0), os.pread(file.fileno(), size, max(0, length - size))
        except OSError as error:
            raise DataError(error.strerror or str(error)) from error

    @property
    def is_noted_readable(self) -> bool:
        """Never: no list of the images is kept."""
        return False

    def note_readable(self) -> None:
        """There is no place for it."""

    def select(self, indices: NDArray[np.int64]) -> Self:
        """The same set with only these images, ascending."""
        counts = np.diff(self.first)[indices]
        rows = np.concatenate([np.arange(self.first[index], self.first[index + 1]) for index in indices])
        starts = np.concatenate([[0], self.segment_ends])
        segments = [self.segments[starts[row] : starts[row + 1]] for row in rows]
        by_row = ("annotation_ids", "labels", "boxes", "areas", "crowd", "degenerate", "boxed")
        return replace(
            self,
            files=self.files[indices],
            ids=self.ids[indices],
            sizes=self.sizes[indices],
            first=np.concatenate([[0], np.cumsum(counts)]),
            segments=np.concatenate([self.segments[:0], *segments]),
            segment_ends=np.cumsum([len(segment) for segment in segments], dtype=np.int64),
            digest=xxhash.xxh3_128_hexdigest(self.digest.encode() + self.ids[indices].tobytes()),
            **{name: getattr(self, name)[rows] for name in by_row},
        )

    def check_trainable(self, key: str) -> None:
        """Whether there is something to learn from, and nothing that would be taken for background in silence.

        Raises:
            DataError: objects with a box and no mask, or no object at all. `key` is what the message calls the set.
        """
        boxed = np.flatnonzero(self.boxed & ~self.crowd)
        if len(boxed):
            raise DataError(
                f"{key}: {len(boxed)} of {len(self.boxed)} annotations (the first is {self.annotation_ids[boxed[0]]}) "
                "have a box and no mask ('segmentation' is empty or absent), and masks are what is learned: give an "
                "instances file, draw these objects' outlines, or take the annotations away"
            )
        self.check_scorable(key)
        if not (~self.crowd & ~self.degenerate).any():
            raise DataError(
                f"{key}: nothing to learn from: of {len(self.crowd)} annotations none has an area inside its image"
            )

    def check_scorable(self, key: str) -> None:
        """Raises DataError if there is no object, or but crowds."""
        if self.crowd.all():
            raise DataError(
                f"{key}: no object in it: {len(self.ids)} images have {len(self.crowd)} annotations"
                f"{', all of them crowds (iscrowd)' if len(self.crowd) else ''}"
            )

    def instances(self, index: int) -> Instances:
        """The objects of an image to train on: no crowds, nothing degenerate; an image may have none."""
        rows = np.arange(self.first[index], self.first[index + 1])
        rows = rows[~self.crowd[rows] & ~self.degenerate[rows]]
        boxes = _inside(self.boxes[rows], self.sizes[index : index + 1])
        return Instances(boxes, self.labels[rows], [self._segment(row) for row in rows])

    def crowds(self, index: int) -> list[Any]:
        """The segments of an image's crowds, regions of many objects."""
        rows = np.arange(self.first[index], self.first[index + 1])
        return [segment for row in rows[self.crowd[rows]] if (segment := self._segment(row))]

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
    """Read an annotation file; with `limit`, only that many of its images, evenly spread.

    Degenerate annotations are counted in a warning. Images without annotations stay: they teach what is no object.

    Raises:
        DataError: no such folder or file; no JSON; an image, category or annotation that isn't in COCO's format,
            named by its id.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images")
    checked = read_annotations(annotations)
    ids = sorted(checked.images)
    if limit is not None and limit < len(ids):
        ids = [ids[place * len(ids) // limit] for place in range(limit)]
    digest = xxhash.xxh3_128_hexdigest(checked.content + f" {limit}".encode())
    return _gather(folder, ids, checked, digest)


def _inside(boxes: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    """[N, 4] left, top, width, height → x1, y1, x2, y2, cut at the edges of images of `sizes` [N or 1, 2]."""
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    limits = sizes[:, [1, 0, 1, 0]]
    clipped: NDArray[np.float64] = np.clip(corners, 0, limits)
    return clipped


def _gather(folder: Path, ids: Sequence[int], annotations: Annotations, digest: str) -> CocoImages:
    images = [annotations.images[id_] for id_ in ids]
    counts = [len(annotations.rows[id_]) for id_ in ids]
    rows = [row for id_ in ids for row in annotations.rows[id_]]
    sizes = np.array([[image.height, image.width] for image in images], dtype=np.int64)
    boxes = np.array([row.box for row in rows], dtype=np.float64).reshape(-1, 4)
    inside = _inside(boxes, np.repeat(sizes, counts, axis=0))
    empty = np.array([row.segment == b"[]" for row in rows], dtype=np.bool_)
    boxed = np.array([row.has_box_alone for row in rows], dtype=np.bool_)
    degenerate = empty | (inside[:, 2:] <= inside[:, :2]).any(1)
    if degenerate.any():
        log.warning(
            "%s: %d annotations have no area inside their image (the first is %d): none is trained on",
            folder, degenerate.sum(), rows[int(degenerate.argmax())].id,
        )  # fmt: skip
    return CocoImages(
        folder=folder,
        files=np.array([image.file_name.encode() for image in images]),
        ids=np.array(ids, dtype=np.int64),
        sizes=sizes,
        categories=tuple((id_, annotations.categories[id_].name) for id_ in sorted(annotations.categories)),
        first=np.cumsum([0, *counts], dtype=np.int64),
        annotation_ids=np.array([row.id for row in rows], dtype=np.int64),
        labels=np.array([row.label for row in rows], dtype=np.int64),
        boxes=boxes,
        areas=np.array([row.area for row in rows], dtype=np.float64),
        crowd=np.array([row.crowd for row in rows], dtype=np.bool_),
        degenerate=degenerate,
        boxed=boxed,
        segments=np.frombuffer(b"".join(row.segment for row in rows), dtype=np.uint8),
        segment_ends=np.cumsum([len(row.segment) for row in rows], dtype=np.int64),
        digest=digest,
    )
