"""Labelled images for fine-tuning and evaluation: decoded, cropped and augmented by (seed, epoch, index) alone.

train, val, num_classes = open_splits(DataConfig(path="/data/imagenet"))  # train/<class>/*.jpg, val/<class>/*.jpg
"""

import logging
import os
import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.configs.data import DataConfig, ValConfig, ViewConfig
from pipeline.data.augment import Augment
from pipeline.data.decoding import decode
from pipeline.data.images import ImageSource, open_images
from pipeline.data.loader import Request
from pipeline.data.readable import leave_unreadable_out
from pipeline.data.rng import Stream, raw_bits
from pipeline.data.slots import Empty
from pipeline.data.views import center_view, draw_view, render, to_chw
from pipeline.errors import ConfigError, DataError, naming_image
from pipeline.files import hash_source

log = logging.getLogger(__name__)


def open_splits(data: DataConfig, val: DataConfig | None = None) -> tuple[ImageSource, ImageSource, int]:
    """Labelled training and validation images, whose labels mean the same, and the number of classes.

    Without `val.path`, `data.path` is a folder that holds train/ and val/, as torchvision's data sets lie, or gives
    `val.share` of its images away (see `hold_back`).

    Raises:
        DataError: nothing there, no classes or but one, too many files that can't be read in one of them, or
            validation has classes that training lacks.
        ConfigError: no `val`, and no train/ and val/ in `data.path`.
    """
    share = val.share if isinstance(val, ValConfig) else None
    if share is None and (val is None or not val.path):
        data, val = _split_folder(data, val)
    sets = {"data.path": open_labelled("data.path", data)}
    if val is not None and share is None:
        sets["val.path"] = open_labelled("val.path", val)
    train, *held_out = leave_unreadable_out(sets)
    classes = train.num_classes
    distinct = len(np.unique(train.labels))
    if distinct < 2:
        raise DataError(f"data.path={data.path} holds images of one class alone: classifying needs two or more")
    if data.limit is None and classes > len(train):
        worst = int(train.labels.argmax())
        raise DataError(
            f"{train.key(worst)} has label {classes - 1}, but data.path={data.path} holds only {len(train)} images of "
            f"{distinct} classes: number the classes from 0 on"
        )
    if share is not None:
        return *hold_back(train, share), classes
    return train, match_classes(held_out[0], train.classes, classes, "data.path"), classes


def hold_back(source: ImageSource, share: float) -> tuple[ImageSource, ImageSource]:
    """(training, validation) images: of each class `share` is for validation, and one image or more for each set.

    A hash of each image's key chooses. So the split is the same in every command and on every machine, and a new image
    hardly changes it. A class of one image is trained on alone.

    Raises:
        DataError: no class has two images.
    """
    hashes = np.array([xxhash.xxh3_64_intdigest(bytes(key)) for key in source.keys], np.uint64)
    chosen = np.zeros(len(source), bool)
    for label in np.unique(source.labels):
        members = np.flatnonzero(source.labels == label)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        chosen[members[np.argsort(hashes[members])[:count]]] = True
    if not chosen.any():
        raise DataError(f"val.share={share} holds no image back: no class of data.path has two images")
    log.info("val.share=%g: %d images for validation, %d to learn from", share, chosen.sum(), (~chosen).sum())
    return source.select(np.flatnonzero(~chosen)), source.select(np.flatnonzero(chosen))


def open_labelled(key: str, data: DataConfig) -> ImageSource:
    """The images at `data.path`, each with its class. `key` is what messages call the path.

    Raises:
        DataError: as `open_images`; an image without a class.
    """
    try:
        source = open_images(data.path, data.limit)
    except DataError as error:
        raise DataError(str(error).replace("data.path", key, 1)) from error
    if source.kind == "flat":
        raise DataError(f"{key}={data.path} holds images but no class folders: give a folder of one folder a class")
    if {"train", "val"} <= set(source.classes):
        raise DataError(f"{key}={data.path} holds train/ and val/: leave val.path out, or give the two as paths")
    _check_labelled(source)
    return source


def match_classes(
    val: ImageSource, classes: tuple[str, ...], num_classes: int, trained_on: str, key: str = "val.path"
) -> ImageSource:
    """`val` with its labels counted as in training.

    Class folders agree by name. Where one of the two sets knows numbers alone, as tars do, folders that are called by
    numbers agree by these. As many folders of other names agree by the order of their names, with a warning.

    Args:
        classes: the names in training, empty where only numbers are known.
        num_classes: their number.
        trained_on: what messages call the training set.
        key: what messages call `val`.

    Raises:
        DataError: it has classes that training lacks, by name or by number, or fewer names than there are numbers.
    """
    if val.classes and classes:
        strange = sorted(set(val.classes) - set(classes))
        if strange:
            raise DataError(
                f"{key} has different classes than {trained_on}: it lacks {', '.join(strange[:3])}"
                f"{f' and {len(strange) - 3} more' if len(strange) > 3 else ''}; give matching folders"
            )
        place = {name: label for label, name in enumerate(classes)}
        number = np.array([place[name] for name in val.classes], dtype=np.int64)
        return replace(val, labels=number[val.labels], classes=classes)
    if val.classes:
        val = _by_number(val, num_classes, trained_on, key)
    elif classes:
        val = _by_folder(val, classes, trained_on, key)
    if val.num_classes > num_classes:
        worst = val.key(int(val.labels.argmax()))
        raise DataError(
            f"{key}: {worst} has label {val.num_classes - 1}, out of range: {trained_on} knows labels up to "
            f"{num_classes - 1} only; give validation images of the same classes"
        )
    return val


def _by_number(val: ImageSource, num_classes: int, trained_on: str, key: str) -> ImageSource:
    """Class folders against a training set that knows numbers."""
    numbers = _folder_numbers(val.classes)
    if numbers is None:
        if len(val.classes) < num_classes:
            raise DataError(
                f"{key} has {len(val.classes)} class folders with names ({val.classes[0]}, ...) and {trained_on} knows "
                f"{num_classes} numbers: which folder is which number can't be told; call the folders by the numbers"
            )
        _say_order(key, val.classes)
        return val
    if numbers.max() >= num_classes:
        worst = val.classes[int(numbers.argmax())]
        raise DataError(
            f"{key}: the class folder {worst} is called by a number, but {trained_on} knows labels up to "
            f"{num_classes - 1} only: call the folders by the numbers of their classes, counted from 0"
        )
    if not np.array_equal(numbers, np.arange(len(numbers))):
        _say_numbers(key, val.classes)
    return replace(val, labels=numbers[val.labels], classes=())


def _by_folder(val: ImageSource, classes: tuple[str, ...], trained_on: str, key: str) -> ImageSource:
    """Class numbers against a training set of class folders."""
    numbers = _folder_numbers(classes)
    if numbers is None:
        _say_order(trained_on, classes)
        return val
    if np.array_equal(numbers, np.arange(len(numbers))):
        return val
    place = np.full(max(int(numbers.max()), val.num_classes - 1) + 1, -1, np.int64)
    place[numbers] = np.arange(len(numbers))
    labels = place[val.labels]
    if (labels < 0).any():
        worst = int(labels.argmin())
        raise DataError(
            f"{key}: {val.key(worst)} has label {val.label(worst)}, and no class folder of {trained_on} is called by "
            "that number: give validation images of the same classes"
        )
    _say_numbers(trained_on, classes)
    return replace(val, labels=labels)


def _folder_numbers(classes: tuple[str, ...]) -> NDArray[np.int64] | None:
    """The numbers that class folders are called by; None unless all are, each by its own."""
    if not all(name.isascii() and name.isdigit() and len(name) < 19 for name in classes):
        return None
    numbers = np.array([int(name) for name in classes], dtype=np.int64)
    return numbers if len(np.unique(numbers)) == len(numbers) else None


def _say_order(where: str, classes: tuple[str, ...]) -> None:
    log.warning(
        "the class folders of %s have names, and the other images numbers: nothing tells whether they agree. Taken as "
        "in the order of the names: %s",
        *(where, ", ".join(f"{name} is {number}" for number, name in enumerate(classes[:3]))),
    )


def _say_numbers(where: str, classes: tuple[str, ...]) -> None:
    log.warning(
        "the class folders of %s (%s, ...) are matched with class numbers by what they are called, not by the order of "
        "their names",
        *(where, ", ".join(classes[:3])),
    )


def _check_labelled(source: ImageSource) -> None:
    if not (source.labels < 0).any():
        return
    if source.text_class:
        raise DataError(
            f"{source.text_class} holds no class number: write numbers from 0 on into the .cls files, or give a "
            "class-folder tree"
        )
    unlabelled = source.key(int(np.argmin(source.labels)))
    if source.classes:
        raise DataError(
            f"{source.root} holds images both in class folders and beside them ({unlabelled}): move one kind away"
        )
    raise DataError(f"{unlabelled} has no class: give a class-folder tree, or tars with KEY.cls beside KEY.jpg")


def _split_folder(data: DataConfig, val: DataConfig | None) -> tuple[DataConfig, DataConfig]:
    root = os.path.expanduser(data.path)
    train, val_folder = os.path.join(root, "train"), os.path.join(root, "val")
    if not (os.path.isdir(train) and os.path.isdir(val_folder)):
        raise ConfigError(
            f"'val.path' is missing: give val.path=..., val.share=0.1 to hold a tenth of the images back, or a "
            f"data.path that holds train/ and val/ ({data.path} doesn't)"
        )
    held_out = val or data.model_copy(update={"limit": None})
    return data.model_copy(update={"path": train}), held_out.model_copy(update={"path": val_folder})


@dataclass
class LabelledBatch:
    """images uint8 [B, 3, S, S], labels int64 [B], `hash_source` of the B files that were read."""

    images: Tensor
    labels: Tensor
    hashes: list[int]

    def to(self, device: torch.device) -> "LabelledBatch":
        images, labels = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.labels))
        return LabelledBatch(images, labels, self.hashes)


class LabelledDataset:
    """Training views when `views` is given (a random resized crop, a flip, then `augment`), else central crops.

    `crop` is the central square's share of the shorter side: 0.875 is 224 out of 256, 1.0 suits images cut already.

    Raises:
        DataError: an image of the source has no class.
    """

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        *,
        crop: float = 0.875,
        views: ViewConfig | None = None,
        augment: Augment | None = None,
    ) -> None:
        _check_labelled(source)
        self.source, self.image_size, self.crop = source, image_size, crop
        self.views, self.augment = views, augment

    def __getitems__(self, requests: list[Request], empty: Empty = np.empty) -> LabelledBatch:
        pixels = empty((len(requests), self.image_size, self.image_size, 3), np.uint8)
        hashes = []
        for row, (epoch, index) in enumerate(requests):
            data = self.source.read(index)
            hashes.append(hash_source(data))
            pixels[row] = np.asarray(self._image(data, epoch, index))
        labels = [self.source.label(index) for _, index in requests]
        return LabelledBatch(to_chw(pixels), torch.tensor(labels), hashes)

    def _image(self, data: bytes, epoch: int, index: int) -> Image.Image:
        try:
            image = decode(data)
        except DataError as error:
            raise DataError(f"image {self.source.key(index)}: {error}; repair it or take it away") from error
        if self.views is None:
            return render(image, center_view(image.height, image.width, self.crop), self.image_size)
        with naming_image(self.source.key(index), "change augment.*, or take the image away"):
            # A fresh view each epoch: the epoch takes the place of the view's number.
            view = draw_view(self.views, index, epoch, image.height, image.width)
            image = render(image, view, self.image_size)
            return _seeded(self.augment, image, self.views.seed, epoch, index) if self.augment else image


def _seeded(augment: Augment, image: Image.Image, seed: int, epoch: int, index: int) -> Image.Image:
    """Augmentation libraries draw from the global generators: set both, so that a resumed run sees the same image."""
    words: Any = raw_bits(2, Stream.AUGMENT, seed, epoch, index)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]) & 0xFFFFFFFF)
    return augment(image)
