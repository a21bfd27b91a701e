"""k-NN on labelled images while a student is pre-trained: the number that people watch.

Every process takes its share of the images; all of them then hold all features, and the same figures.
"""

from collections.abc import Callable

import torch
from accelerate.utils import gather_object
from pydantic import Field
from torch import Tensor, nn

from pipeline.assembly import features_of
from pipeline.config import Config
from pipeline.data.images import DataConfig, ImageSource, open_images
from pipeline.data.labelled import LabelledDataset, evaluation_batches
from pipeline.data.readable import check_readable
from pipeline.errors import DataError
from pipeline.evaluation.features import extract_features
from pipeline.evaluation.knn import knn_classify


class WatchConfig(Config):
    """k-NN every so many epochs."""

    data: DataConfig  # labelled images whose neighbours vote
    val: DataConfig  # labelled images that are classified
    every: float = Field(10, gt=0)  # epochs
    k: int = Field(20, ge=1)
    temperature: float | None = Field(0.07, gt=0)  # as in `knn`
    crop: float = Field(0.875, gt=0, le=1)  # central share of each image; 1 for images cut already


def open_watch(
    config: WatchConfig, image_size: int, rank: int, processes: int, device: torch.device
) -> Callable[[nn.Module, int], dict[str, float]]:
    """(student, step) → {"knn_top1", "knn_top5"}, fractions.

    Raises:
        DataError: no labels, or classes in one set that the other doesn't have.
    """
    train, val = open_images(config.data.path, config.data.limit), open_images(config.val.path, config.val.limit)
    if (train.classes and val.classes and train.classes != val.classes) or val.num_classes > train.num_classes:
        raise DataError("knn.data and knn.val have different classes: give matching folders")
    for source in (train, val):
        LabelledDataset(source, image_size)  # says now, not after ten epochs, which image has no class,
        check_readable(source)  # or is empty

    def features(student: nn.Module, source: ImageSource, workers: int) -> tuple[Tensor, Tensor]:
        if rank >= len(source):  # fewer images than processes
            mine: list[tuple[Tensor, Tensor]] = []
        else:
            batches = evaluation_batches(source, image_size, config.crop, workers, rank, processes)
            encode = features_of(student, device)  # type: ignore[arg-type]  # what pretrain hands over is a Student
            mine = [extract_features(encode, ((batch.images, batch.labels) for batch in batches))]
        shares = gather_object(mine)
        return torch.cat([x for x, _ in shares]), torch.cat([y for _, y in shares])

    def evaluate(student: nn.Module, _step: int) -> dict[str, float]:
        train_x, train_y = features(student, train, config.data.workers)
        val_x, val_y = features(student, val, config.val.workers)
        k = min(config.k, len(train_x))
        figures = knn_classify(train_x, train_y, val_x, val_y, k, config.temperature, train.num_classes, device=device)
        return {f"knn_{name}": value for name, value in figures.items()}

    return evaluate
