"""Which patches stay visible: drawn from the teacher's attention, in the worker, as a function of (seed, epoch, index).

Focused mimicking (MR-MAE, arXiv 2303.05475) keeps the patches that the teacher attends to. Sampling k of them without
replacement, with probability proportional to attention, is one sort: add Gumbel noise to the log-probabilities and
take the k largest (Efraimidis and Spirakis 2006; Kool et al., arXiv 1903.06059).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.configs.data import Focus
from pipeline.data.rng import Stream, uniforms_of_each

# Attention arrives as fp16: a patch that rounds to zero must stay possible, and its logarithm finite.
_FLOOR = 1e-8


def visible_count(patches: int, mask_ratio: float) -> int:
    """How many of `patches` stay visible: patches × (1 - mask_ratio), rounded down as in MAE, and at least one.

    Up to what rounding errors take away: 1 - 0.8 is a little less than 0.2, but a fifth of 400 patches is 80.
    """
    return max(1, math.floor(patches * (1 - mask_ratio) + 1e-9))


def predicted_count(patches: int, keep: int, share: float) -> int | None:
    """How many masked patches are predicted: `patches` × share, rounded down, at least one; None for all of them."""
    count = visible_count(patches, 1 - share)
    return count if count < patches - keep else None


@dataclass(frozen=True)
class MaskSampler:
    """Draws the masks of a run: which patches of a sample stay visible, as a function of (seed, epoch, index).

    Several masks of a sample are disjoint as long as M × K ≤ L, so that M = L / K of them show each patch once. Drawn
    by attention, they share out one draw without replacement: the first takes what a single mask would take.

    Attributes:
        patches: L, patches of a view.
        keep: K, patches that stay visible.
        focus: "sampled" or "top-k" by the teacher's attention, or "random".
        count: M, masks of each sample.
        predict: P, masked patches that are predicted; None for all of them.
        independent: draw several masks by attention apart from each other, as runs did before they were disjoint.
    """

    patches: int
    keep: int
    focus: Focus
    seed: int
    count: int = 1
    predict: int | None = None
    independent: bool = False

    @property
    def shares_a_draw(self) -> bool:
        """Whether several masks by attention share out one draw."""
        several = self.focus == "sampled" and self.count > 1
        return several and not self.independent and self.count * self.keep <= self.patches

    def draw(self, attention: NDArray[Any] | None, samples: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
        """`ids_keep` int64 [B, M, K] of samples (epoch, index), from attention float [B, L], any positive scale.

        Attention may be None for focus "random" alone.
        """
        rows = [None] * len(samples) if attention is None else attention
        return np.stack([self.ids_keep(row, noise) for row, noise in zip(rows, self.noise(samples), strict=True)])

    def noise(self, samples: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
        """What is random in the masks of some samples (epoch, index), whatever their attention: [B, M, L].

        Uniform in (0, 1); for focus "sampled" Gumbel, to be added to the attention's logarithm.
        """
        shape = len(samples), self.count, self.patches
        if self.keep == self.patches:  # whole views: nothing is drawn
            return np.zeros(shape)
        noise = uniforms_of_each(self.count * self.patches, Stream.MASK, self.seed, samples).reshape(shape)
        return -np.log(-np.log(noise)) if self.focus == "sampled" else noise

    def ids_keep(self, attention: NDArray[Any] | None, noise: NDArray[np.float64]) -> NDArray[np.int64]:
        """`ids_keep` int64 [M, K] of one sample, ascending in each row, by its `noise` [M, L]."""
        if self.keep == self.patches:
            return np.tile(np.arange(self.patches), (len(noise), 1))
        if self.focus == "top-k" and attention is not None:
            best = np.argsort(-attention.astype(np.float64), kind="stable")[: self.keep]
            ids = np.tile(best, (len(noise), 1))
        elif self.focus == "sampled" and attention is not None:
            scores = np.log(np.maximum(attention, _FLOOR, dtype=np.float64)) + noise
            first = self.patches - self.keep
            if self.shares_a_draw:
                ids = np.argsort(-scores[0])[: self.count * self.keep].reshape(self.count, self.keep)
            else:
                ids = scores.argpartition(first, axis=1)[:, first:]
        elif self.count * self.keep <= self.patches:
            ids = np.argsort(noise[0])[: self.count * self.keep].reshape(self.count, self.keep)
        else:
            ids = np.argsort(noise, axis=1)[:, : self.keep].copy()
        ids.sort(axis=1)
        return ids.astype(np.int64, copy=False)

    def lots(self, samples: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
        """What decides which masked patches of some samples (epoch, index) are predicted: [B, M, L] in (0, 1)."""
        shape = len(samples), self.count, self.patches
        return uniforms_of_each(self.count * self.patches, Stream.PREDICT, self.seed, samples).reshape(shape)

    def ids_predict(self, ids_keep: NDArray[np.int64], lots: NDArray[np.float64]) -> NDArray[np.int64]:
        """Masked patches int64 [M, P] of one sample that are predicted, those of the lowest `lots` [M, L], ascending.

        `ids_keep` [M, K] has the visible patches, which are left out.
        """
        masked = lots.copy()
        np.put_along_axis(masked, ids_keep, 1.0, axis=1)  # above all lots
        return np.sort(masked.argsort(axis=1, kind="stable")[:, : self.predict], axis=1)


def select_predicted(lots: Tensor, ids_keep: Tensor, count: int) -> Tensor:
    """`MaskSampler.ids_predict` on the device: lots float64 [B, L] and ids_keep int64 [B, K] to int64 [B, count]."""
    return lots.scatter(1, ids_keep, 1.0).argsort(dim=1, stable=True)[:, :count].sort(dim=1).values


def select_visible(attention: Tensor, gumbel: Tensor | None, keep: int, count: int = 1) -> Tensor:
    """`MaskSampler.ids_keep` on the device, where a live teacher's attention is; equal for the same fp16 attention.

    Args:
        attention: float [B, L], any positive scale.
        gumbel: float64 [B, L] of `MaskSampler.noise` for focus "sampled"; None for "top-k".
        count: masks that share out one draw.

    Returns:
        int64 [B * count, keep], ascending in each row.
    """
    scores = attention.half().double()
    if gumbel is not None:
        scores = scores.clamp(min=_FLOOR).log() + gumbel
    best = torch.argsort(-scores, dim=1, stable=True)[:, : count * keep]
    return best.reshape(-1, keep).sort(dim=1).values
