"""Scenes: images whose pixels have a class each, as ADE20K's folders hold them.

source = open_images("images/validation")
scenes = FolderScenes(source, Path("annotations/validation"), LabelCode(150, zero_is_none=True))
scenes.label_map(7)  # int16 [H, W], of annotations/validation/KEY.png; IGNORED where no class is given
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.decoding import decode, decode_numbers
from pipeline.data.images import ImageSource
from pipeline.data.listing import spread
from pipeline.errors import DataError

IGNORED = -1  # label of a pixel that is neither trained on nor scored


class Scenes(Protocol):
    """Encoded images by index, and the labels of their pixels."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str: ...

    def read(self, index: int) -> bytes: ...

    def label_map(self, index: int) -> NDArray[np.int16]:
        """[H, W], from 0; `IGNORED` where a pixel has no class. Raises DataError, which names the file."""


@dataclass(frozen=True)
class LabelCode:
    """How a label file's numbers mean classes.

    Attributes:
        num_classes: C; labels are 0 to C - 1.
        ignore_index: the number of pixels without a class.
        zero_is_none: 0 is no class either, and number n is class n - 1, as in ADE20K.
    """

    num_classes: int
    ignore_index: int = 255
    zero_is_none: bool = False

    def read(self, numbers: NDArray[np.int32], name: str) -> NDArray[np.int16]:
        """A file's numbers [H, W] → labels. Raises DataError if one is no class."""
        ignored = numbers == self.ignore_index
        labels = numbers
        if self.zero_is_none:
            ignored |= numbers == 0
            labels = numbers - 1
        odd = (labels >= self.num_classes) & ~ignored
        if odd.any():
            first = 1 if self.zero_is_none else 0
            raise DataError(
                f"label file {name} holds the number {numbers[odd][0]}: classes are {first} to "
                f"{self.num_classes - 1 + first}, and {self.ignore_index} is no class; set labels.num_classes, "
                "labels.ignore_index and labels.reduce_zero_label as the files are"
            )
        return np.where(ignored, IGNORED, labels).astype(np.int16)


class FolderScenes:
    """Images, and PNGs of the same names in a folder of the same shape.

    Raises:
        DataError: an image without a label file.
    """

    def __init__(self, source: ImageSource, folder: Path, code: LabelCode) -> None:
        self._source, self._folder, self._code = source, folder, code
        missing = [index for index in range(len(source)) if not self._label_file(index).is_file()]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(source)} images have no label file, such as {self._label_file(missing[0])}: "
                "labels are PNGs with the names of the images"
            )

    def __len__(self) -> int:
        return len(self._source)

    def key(self, index: int) -> str:
        return self._source.key(index)

    def read(self, index: int) -> bytes:
        return self._source.read(index)

    def label_map(self, index: int) -> NDArray[np.int16]:
        file = self._label_file(index)
        content = _content(file)
        try:
            numbers = decode_numbers(content)
        except DataError as error:
            raise DataError(f"label file {file}: {error}") from error
        return self._code.read(numbers, str(file))

    def label_digest(self) -> str:
        """xxh3-128 of the content of all label files, in the order of the images. Raises DataError, as `label_map`."""
        hasher = xxhash.xxh3_128()
        for content in spread(self._read_labels, range(len(self)), "label file"):
            hasher.update(content.to_bytes(8, "little"))
        return hasher.hexdigest()

    def _read_labels(self, index: int) -> int:
        """The hash of a label file."""
        return xxhash.xxh3_64_intdigest(_content(self._label_file(index)))

    def _label_file(self, index: int) -> Path:
        return (self._folder / self._source.key(index)).with_suffix(".png")


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"label file {file}: {error.strerror or error}") from error


def decode_scene(scenes: Scenes, index: int) -> tuple[Image.Image, NDArray[np.int16]]:
    """An image and its labels.

    Raises:
        DataError: one of them can't be read, or they have different sizes; the message names the file.
    """
    data = scenes.read(index)
    try:
        image = decode(data)
    except DataError as error:
        raise DataError(f"image {scenes.key(index)}: {error}; repair it or take it away") from error
    labels = scenes.label_map(index)
    if labels.shape != (image.height, image.width):
        raise DataError(
            f"image {scenes.key(index)} has {image.width} × {image.height} pixels, its labels {labels.shape[1]} × "
            f"{labels.shape[0]}: labels must have the size of the image; make them anew, or take both away"
        )
    return image, labels
