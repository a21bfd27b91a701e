"""k nearest neighbours on frozen features: how well they separate classes without training.

The weighted vote is the protocol of DINO (arXiv 2104.14294, appendix; from Wu et al., arXiv 1805.01978, eq. 13).
"""

import torch
import torch.nn.functional as F
from accelerate.utils import gather
from torch import Tensor

from pipeline.evaluation.features import FeatureSets
from pipeline.evaluation.metrics import topk_accuracy
from pipeline.processes import float32_products

# Rows compared at once: 128 MB of similarities.
TRAIN_CHUNK, TEST_CHUNK = 65_536, 512


def knn_classify(
    sets: FeatureSets,
    k: int = 20,
    temperature: float | None = 0.07,
    *,
    device: str | torch.device | None = None,
    shared: bool = False,
) -> dict[str, float]:
    """Classify features by the vote of their k most similar training features (cosine), compared in fp32.

    A neighbour of similarity s weighs exp(s / temperature), or 1 with `temperature=None`; equal votes go to the
    lower class.

    Args:
        sets: N training features and M to classify; normalised here.
        k: neighbours; all of them if N is smaller.
        temperature: of the weights, None for a plain vote.
        device: where to compute; None for where the training features are.
        shared: every process calls this with its share of the training features and the same others; the nearest of all
            shares vote. `k` may then be more than one process has, but not more than all have.

    Returns:
        {"top1": ..., "top5": ...}, fractions in 0..1.
    """
    device = torch.device(device) if device is not None else sets.train_x.device
    train = F.normalize(sets.train_x.to(device, torch.float32), dim=1)
    train_labels = sets.train_y.to(device)
    neighbours: list[tuple[Tensor, Tensor]] = []  # similarities and labels
    # In training this runs under autocast, and neighbours lie closer together than bf16 or TF32 can tell.
    with torch.autocast(device.type, enabled=False), float32_products("highest"):
        for rows in torch.split(sets.val_x, TEST_CHUNK):
            test = F.normalize(rows.to(device, torch.float32), dim=1)
            similarity, indices = _nearest(test, train, min(k, len(train)))
            neighbours.append((similarity, train_labels[indices]))
        similarity, labels = (torch.cat(parts) for parts in zip(*neighbours, strict=True))
        if shared:
            similarity, labels = _nearest_of_all(similarity, labels, k)
        chunks = zip(torch.split(similarity, TEST_CHUNK), torch.split(labels, TEST_CHUNK), strict=True)
        votes = torch.cat([_vote(*chunk, sets.num_classes, temperature) for chunk in chunks])
    return topk_accuracy(votes, sets.val_y.to(device))


def _nearest_of_all(similarity: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of all processes' neighbours [M,k], of which one with few training features has fewer columns."""
    missing = k - similarity.shape[1]
    similarity, labels = F.pad(similarity, (0, missing), value=float("-inf")), F.pad(labels, (0, missing))
    similarity, labels = (gather(values.T.contiguous()).T for values in (similarity, labels))  # [M, processes * k]
    similarity, order = similarity.topk(k, dim=1)
    return similarity, labels.gather(1, order)


def _nearest(test: Tensor, train: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarities and indices [M,k] of the k nearest rows of `train`, a block of it at a time."""
    best = test.new_empty(len(test), 0)
    indices = torch.empty(len(test), 0, dtype=torch.long, device=test.device)
    for start in range(0, len(train), TRAIN_CHUNK):
        block = train[start : start + TRAIN_CHUNK]
        similarity, rows = (test @ block.T).topk(min(k, len(block)), dim=1)
        best, order = torch.cat([best, similarity], dim=1).topk(min(k, best.shape[1] + similarity.shape[1]), dim=1)
        indices = torch.cat([indices, rows + start], dim=1).gather(1, order)
    return best, indices


def _vote(similarity: Tensor, labels: Tensor, classes: int, temperature: float | None) -> Tensor:
    """Similarities and labels of the neighbours [M,k] → votes [M,C]."""
    votes = similarity.new_zeros(len(similarity), classes)
    if temperature is None:
        votes.scatter_add_(1, labels, torch.ones_like(similarity))
        # Whole votes often tie. Less than half a vote, falling with the class, decides the same way on every device.
        return votes - torch.linspace(0, 0.5, classes, device=votes.device)
    # The nearest is taken off before exp: a factor on all votes, and no overflow at low temperatures.
    return votes.scatter_add_(1, labels, ((similarity - similarity[:, :1]) / temperature).exp())
