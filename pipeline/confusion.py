"""The confusion matrix, of pixels and of images alike."""

import torch
from torch import Tensor


def confusion_counts(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """How many samples have which true (row) and predicted (column) class: int64 [C, C].

    Args:
        labels: integers of any shape; below 0: not counted.
        predicted: int64, of this shape, 0 to C - 1 where it counts.
    """
    counted = labels >= 0
    pairs = labels[counted].long() * num_classes + predicted[counted]
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
