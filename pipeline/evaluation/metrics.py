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
    highest = logits.topk(min(max(ks), logits.shape[1]), dim=1).indices  # [N, largest k]
    hits = highest == labels[:, None].to(highest.device)
    return {f"top{k}": hits[:, :k].any(dim=1).to(torch.float64).mean().item() for k in ks}
