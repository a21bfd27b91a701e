"""k-NN on labelled images while a student is pre-trained: the number that people watch.

Every process takes its share of the images, and keeps the features of those whose neighbours vote: what all of them
hold is the features of the images to classify, and each finds the nearest among its own.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.assembly.students import tokens_of
from pipeline.configs.evaluation import KnnCallbackConfig
from pipeline.data.images import ImageSource, open_images
from pipeline.data.labelled import LabelledDataset, match_classes
from pipeline.data.loader import load_in_order
from pipeline.data.readable import leave_unreadable_out
from pipeline.evaluation.features import FeatureSets, extract_features
from pipeline.evaluation.knn import knn_classify
from pipeline.models import Student
from pipeline.processes import gather_rows, processes, share_of


def knn_callback(
    config: KnnCallbackConfig, image_size: int
) -> tuple[Callable[[nn.Module, int], dict[str, float]], int]:
    """A function (student, step) → {"knn_top1", "knn_top5"}, fractions; and the number of images classified.

    Raises:
        DataError: no labels, too many files that can't be read, or classes in one set that the other doesn't have.
    """
    state = processes()
    train, val = open_images(config.data.path, config.data.limit), open_images(config.val.path, config.val.limit)
    for source in (train, val):
        LabelledDataset(source, image_size)  # says now, not after ten epochs, which image has no class
    train, val = leave_unreadable_out({"knn.data.path": train, "knn.val.path": val})
    val = match_classes(val, train.classes, train.num_classes, "knn.data", "knn.val")

    def features(student: nn.Module, source: ImageSource, workers: int) -> tuple[Tensor, Tensor]:
        """Of this process's share."""
        assert isinstance(student, Student)
        tokens, share = tokens_of(student, state.device), share_of(len(source))
        if not share:  # fewer images than processes
            return torch.empty(0, student.encoder.dim), torch.empty(0, dtype=torch.int64)
        dataset = LabelledDataset(source, image_size, crop=config.crop)
        batches = load_in_order(dataset, share, config.eval_batch_size, workers)
        return extract_features(
            lambda images: tokens(images).mean(1), ((batch.images, batch.labels) for batch in batches)
        )

    def evaluate(student: nn.Module, _step: int) -> dict[str, float]:
        train_x, train_y = features(student, train, config.data.workers)
        val_x, val_y = (gather_rows(rows, len(val)) for rows in features(student, val, config.val.workers))
        figures = knn_classify(
            FeatureSets(train_x, train_y, val_x, val_y, train.num_classes),
            min(config.k, len(train)),
            config.temperature,
            device=state.device,
            shared=state.num_processes > 1,
        )
        return {f"knn_{name}": value for name, value in figures.items()}

    return evaluate, len(val)
