"""k nearest neighbours on frozen features: what they separate without any training.

The weighted vote is the protocol of DINO (arXiv 2104.14294, appendix; from Wu et al., arXiv 1805.01978, eq. 13).
"""

import torch
import torch.nn.functional as F
from accelerate.utils import gather
from torch import Tensor

from pipeline.evaluation.metrics import topk_accuracy
from pipeline.processes import float32_products

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
    shared: bool = False,
) -> dict[str, float]:
    """Classify test features by the vote of their k most similar training features (cosine), compared in fp32.

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
        shared: every process calls this with training features of its own and the same test features: each looks among
            its own, and the nearest of all vote. `k` may then be more than a process has, not more than all have.

    Returns:
        {"top1": ..., "top5": ...}, fractions in 0..1.
    """
    device = torch.device(device) if device is not None else train_x.device
    classes = num_classes or int(max(train_y.max(), test_y.max())) + 1
    train = F.normalize(train_x.to(device, torch.float32), dim=1)
    train_labels = train_y.to(device)
    found: list[tuple[Tensor, Tensor]] = []
    # In training this runs under autocast, and neighbours lie closer together than bf16 or TF32 can tell.
    with torch.autocast(device.type, enabled=False), float32_products("highest"):
        for rows in torch.split(test_x, chunk):
            test = F.normalize(rows.to(device, torch.float32), dim=1)
            similarity, neighbours = _nearest(test, train, min(k, len(train)))
            found.append((similarity, train_labels[neighbours]))
        similarity, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        if shared:
            similarity, labels = _nearest_of_all(similarity, labels, k)
        votes = torch.cat(
            [
                _vote(*rows, classes, temperature)
                for rows in zip(torch.split(similarity, chunk), torch.split(labels, chunk), strict=True)
            ]
        )
    return topk_accuracy(votes, test_y.to(device), ks=(1, 5))


def _nearest_of_all(similarity: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of all processes' neighbours [M,k], of which one with few training features has fewer columns."""
    missing = k - similarity.shape[1]
    similarity, labels = F.pad(similarity, (0, missing), value=float("-inf")), F.pad(labels, (0, missing))
    every, theirs = (gather(values.T.contiguous()).T for values in (similarity, labels))  # [M, processes * k]
    similarity, order = every.topk(k, dim=1)
    return similarity, theirs.gather(1, order)


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
