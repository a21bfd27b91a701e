"""Top-1 and top-5 accuracy, and that of each class."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def topk_accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of samples whose label has the highest score, and one of the five highest.

    Args:
        logits: [N,C], any scores; higher is likelier. With fewer than five classes, all count.
        labels: [N] int64.

    Returns:
        {"top1": 0.75, "top5": 0.93}, fractions in 0..1 of all N samples.
    """
    top1, top5 = (topk_hits(logits, labels) / len(logits)).tolist()
    return {"top1": top1, "top5": top5}


def topk_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How many samples have their label at the highest score, and among the five highest: float64 [2]."""
    highest = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [N, 5]
    hits = highest == labels[:, None].to(highest.device)
    return torch.stack([hits[:, :k].any(dim=1).sum(dtype=torch.float64) for k in (1, 5)])


def class_hits(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The samples of each class, and how many of them are predicted right: [C] each."""
    return np.bincount(labels, minlength=classes), np.bincount(labels[labels == predicted], minlength=classes)


def class_accuracies(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Of each class that has images: their number, and the share that is predicted right; {name: {"images", "top1"}}.

    Args:
        labels, predicted: [N], below the number of `names`.
    """
    images, hits = class_hits(labels, predicted, len(names))
    return {
        names[label]: {"images": int(images[label]), "top1": float(hits[label] / images[label])}
        for label in np.flatnonzero(images).tolist()
    }
