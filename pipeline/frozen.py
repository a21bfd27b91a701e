"""Frozen features of labelled images: what `knn` and `linear-probe` both start from.

The subject is a checkpoint, an untrained student, a teacher, or raw pixels: the references that a number needs.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.assembly import features_of, load_encoder, load_teacher
from pipeline.config import Config, PathField
from pipeline.data.images import DataConfig, ImageSource, open_images
from pipeline.data.labelled import evaluation_batches
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.features import extract_features
from pipeline.models.config import StudentConfig
from pipeline.processes import processes
from pipeline.progress import track
from pipeline.teachers.config import TeacherConfig


class FrozenConfig(Config):
    """What is frozen, and the images that it is measured on."""

    data: DataConfig  # labelled images that the classifier learns from
    val: DataConfig  # labelled images that it is measured on
    init: PathField | None = None  # a run, a checkpoint or a public weights file
    student: StudentConfig | None = None  # for a lone weights file, or an untrained student
    teacher: TeacherConfig | None = None  # measure a teacher instead
    pixels: bool = False  # measure raw pixels instead
    image_size: int | None = Field(None, ge=8, le=4096)  # pixels; default: what the model was built for, else 224
    crop: float = Field(0.875, gt=0, le=1)  # central share of each image; 1 for images cut already
    seed: int = Field(0, ge=0)  # of an untrained student
    output: PathField | None = None  # folder for metrics.json

    @model_validator(mode="after")
    def _one_subject(self) -> "FrozenConfig":
        if self.pixels + (self.teacher is not None) + (self.init is not None) > 1:
            raise ValueError("give one of init, teacher.spec and pixels=true")
        return self


class Frozen(NamedTuple):
    """Features float32 [N, D] and labels int64 [N] of both sets."""

    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    num_classes: int


def frozen_features(config: FrozenConfig) -> Frozen:
    """One forward pass over both sets.

    Raises:
        DataError: no labels, or labels in one set that the other doesn't have.
    """
    train, val = open_images(config.data.path, config.data.limit), open_images(config.val.path, config.val.limit)
    named = train.classes and val.classes
    if (named and train.classes != val.classes) or val.num_classes > train.num_classes:
        raise DataError("data.path and val.path have different classes: give matching folders")
    device = processes().device
    torch.manual_seed(config.seed)
    encode, size = _encoder(config, device)
    train_x, train_y = extract_features(
        encode, _batches(train, size, config.crop, config.data.workers, "features (train)")
    )
    val_x, val_y = extract_features(encode, _batches(val, size, config.crop, config.val.workers, "features (val)"))
    return Frozen(train_x, train_y, val_x, val_y, train.num_classes)


def write_metrics(config: FrozenConfig, name: str, metrics: dict[str, Any]) -> None:
    """Add the result under `name` to output/metrics.json, if an output is wanted."""
    if config.output is None:
        return
    config.output.mkdir(parents=True, exist_ok=True)
    file = config.output / "metrics.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps({**known, name: metrics}, indent=1) + "\n", encoding="utf-8")


def _encoder(config: FrozenConfig, device: torch.device) -> tuple[Callable[[Tensor], Tensor], int]:
    """uint8 images → features, and the side that the images should have."""
    if config.pixels:
        return lambda images: images.float().flatten(1) / 255, config.image_size or 224
    if config.teacher is not None:
        teacher = load_teacher(config.teacher, device)
        return lambda images: teacher(images.to(device)).tokens.mean(1), config.image_size or teacher.image_size
    model = load_encoder(config.init, config.student)
    size = model.encoder.image_size[0]
    if config.image_size not in (None, size):
        raise ConfigError(f"image_size={config.image_size}, but the model was built for {size} pixels: leave it out")
    return features_of(model, device), size


def _batches(source: ImageSource, size: int, crop: float, workers: int, label: str) -> Iterator[tuple[Tensor, Tensor]]:
    batches = evaluation_batches(source, size, crop, workers)
    for batch in track(batches, -(-len(source) // 128), label, "batch"):
        yield batch.images, batch.labels
