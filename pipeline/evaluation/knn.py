"""k nearest neighbours on frozen features: what they separate without any training.

The weighted vote is the protocol of DINO (arXiv 2104.14294, appendix; from Wu et al., arXiv 1805.01978, eq. 13).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluation.metrics import topk_accuracy

# Training features compared at once: with 512 test rows, 128 MB of similarities.
TRAIN_CHUNK = 65_536


def knn_classify(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    k: int = 20,
    temperature: float | None = 0.07,
    num_classes: int | None = None,
    chunk: int = 512,
    device: str | torch.device | None = None,
) -> dict[str, float]:
    """Classify test features by the vote of their k most similar training features (cosine).

    A neighbour of similarity s weighs exp(s / temperature), or 1 with `temperature=None`; equal votes go to the
    lower class.

    Args:
        train_x: [N,D] features; normalised here.
        train_y: [N] int64 labels.
        test_x: [M,D]. test_y: [M] int64.
        k: neighbours; all of them when N is smaller.
        temperature: of the weights, None for a plain vote.
        num_classes: C, else the highest label + 1.
        chunk: test rows at once, which bounds the memory.
        device: where to compute; None for where `train_x` is.

    Returns:
        {"top1": ..., "top5": ...}, fractions in 0..1.
    """
    device = torch.device(device) if device is not None else train_x.device
    classes = num_classes or int(max(train_y.max(), test_y.max())) + 1
    train = F.normalize(train_x.to(device, torch.float32), dim=1)
    train_labels = train_y.to(device)
    votes = []
    # In training this runs under autocast, and neighbours lie closer together than bf16 can tell.
    with torch.autocast(device.type, enabled=False):
        for rows in torch.split(test_x, chunk):
            test = F.normalize(rows.to(device, torch.float32), dim=1)
            similarity, neighbours = _nearest(test, train, min(k, len(train)))
            votes.append(_vote(similarity, train_labels[neighbours], classes, temperature))
    return topk_accuracy(torch.cat(votes), test_y.to(device), ks=(1, 5))


def _nearest(test: Tensor, train: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarities and indices [M,k] of the k nearest rows of `train`, a block of it at a time."""
    best = test.new_empty(len(test), 0)
    indices = torch.empty(len(test), 0, dtype=torch.long, device=test.device)
    for start in range(0, len(train), TRAIN_CHUNK):
        block = train[start : start + TRAIN_CHUNK]
        found, where = (test @ block.T).topk(min(k, len(block)), dim=1)
        best, order = torch.cat([best, found], dim=1).topk(min(k, best.shape[1] + found.shape[1]), dim=1)
        indices = torch.cat([indices, where + start], dim=1).gather(1, order)
    return best, indices


def _vote(similarity: Tensor, labels: Tensor, classes: int, temperature: float | None) -> Tensor:
    """Similarities and labels of the neighbours [M,k] → votes [M,C]."""
    votes = similarity.new_zeros(len(similarity), classes)
    if temperature is None:
        votes.scatter_add_(1, labels, torch.ones_like(similarity))
        # Whole votes tie often; less than half a vote, falling with the class, settles it the same way everywhere.
        return votes - torch.linspace(0, 0.5, classes, device=votes.device)
    # The nearest is taken off before exp: a factor on all votes, and no overflow at low temperatures.
    return votes.scatter_add_(1, labels, ((similarity - similarity[:, :1]) / temperature).exp())
