"""The linear head of dense evaluation: a batch norm and one linear layer on each patch token.

As DINOv2 evaluates frozen features (arXiv 2304.07193, section 7.4): what the head can't do, the features must.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.segmentation.scenes import IGNORED

_AT_ONCE = 8  # maps that are enlarged together: what they fill stays in a CPU's caches


class SegmentationHead(nn.Module):
    """Patch tokens → scores of classes.

    Args:
        dim: D, channels of the tokens.
        num_classes: C.
        spec: JSON-able description of this head and its features.
    """

    def __init__(self, dim: int, num_classes: int, spec: Mapping[str, Any]) -> None:
        super().__init__()
        self.spec = dict(spec)
        self.norm = nn.BatchNorm1d(dim)
        self.head = nn.Linear(dim, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [B, L, D] of a grid (h, w) → logits [B, C, h, w]."""
        logits: Tensor = self.head(self.norm(tokens.flatten(0, 1)))
        maps: Tensor = logits.unflatten(0, (len(tokens), *grid))  # [B, h, w, C]
        return maps.permute(0, 3, 1, 2)


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits [B, C, h, w], enlarged to the labels int16 [B, S, S]: the mean over pixels of a class."""
    enlarged = F.interpolate(logits.float(), size=labels.shape[1:], mode="bilinear")
    total = F.cross_entropy(enlarged, labels.long(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def label_scene(
    logits: Tensor, corners: Sequence[tuple[int, int]], cells: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """The labels [H, W] of an image whose windows have these logits.

    Where windows overlap, the mean of their logits counts.

    Args:
        logits: [W, C, h, w].
        corners: the cell of the image's grid at which each window begins.
        cells: (rows, columns) of that grid.
        size: (H, W), pixels.
    """
    h, w = logits.shape[2:]
    total = logits.new_zeros(logits.shape[1], *cells, dtype=torch.float32)
    count = logits.new_zeros(cells, dtype=torch.float32)
    for window, (row, column) in zip(logits, corners, strict=True):
        total[:, row : row + h, column : column + w] += window
        count[row : row + h, column : column + w] += 1
    return enlarged_argmax(total / count, size)


def enlarged_argmax(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """The class [H, W] of the highest value, once maps [C, h, w] are enlarged to (H, W).

    Only classes that can be the highest anywhere are enlarged, a few at a time: the same labels as of all of them.
    """
    candidates = _candidates(maps)
    best = maps.new_full(size, -torch.inf)
    labels = torch.zeros(size, dtype=torch.int64, device=maps.device)
    for numbers in candidates.split(_AT_ONCE):
        values, places = F.interpolate(maps[numbers][None], size=size, mode="bilinear")[0].max(0)
        higher = (values > best) | (values.isnan() & ~best.isnan())  # as in argmax, the first of equals counts
        best = torch.where(higher, values, best)
        labels = torch.where(higher, numbers[places], labels)
    return labels


def _candidates(maps: Tensor) -> Tensor:
    """The classes of maps [C, h, w] that may be the highest at some pixel, ascending.

    A pixel lies among four cells, or beside the last ones, and its value between theirs. So a class whose value in each
    of the four is below the lowest of another class there is never the highest.
    """
    padded = F.pad(maps[None], (0, 1, 0, 1), mode="replicate")
    highest, lowest = (F.max_pool2d(sign * padded, 2, 1)[0] * sign for sign in (1, -1))
    slack = 1e-4 * highest.abs().amax() + 1e-30  # interpolation rounds
    return (~(highest + slack < lowest.amax(0))).flatten(1).any(1).nonzero()[:, 0]
