"""Top-k accuracy."""

from collections.abc import Sequence

import torch
from torch import Tensor


def topk_accuracy(logits: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Share of samples whose label is among the k highest scores.

    Args:
        logits: [N,C], any scores; higher is likelier.
        labels: [N] int64.
        ks: the k of each figure; a k above C counts as C.

    Returns:
        {"top1": 0.75, "top5": 0.93} for ks (1, 5): fractions in 0..1, each from all N samples.
    """
    shares = topk_hits(logits, labels, ks) / len(logits)
    return {f"top{k}": share for k, share in zip(ks, shares.tolist(), strict=True)}


def topk_hits(logits: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> Tensor:
    """How many samples have their label among the k highest scores: float64 [len(ks)], where the scores are."""
    highest = logits.topk(min(max(ks), logits.shape[1]), dim=1).indices  # [N, largest k]
    hits = highest == labels[:, None].to(highest.device)
    return torch.stack([hits[:, :k].any(dim=1).sum(dtype=torch.float64) for k in ks])
