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


@dataclass(frozen=True)
class MaskSampler:
    """Draws the masks of a run: which patches of a sample stay visible, as a function of (seed, epoch, index).

    Attributes:
        patches: L, patches of a view.
        keep: K, patches that stay visible.
        focus: "sampled" or "top-k" by the teacher's attention, or "random".
        count: M, masks of each sample.
    """

    patches: int
    keep: int
    focus: Focus
    seed: int
    count: int = 1

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
        noise = uniforms_of_each(self.count * self.patches, Stream.MASK, self.seed, samples).reshape(shape)
        return -np.log(-np.log(noise)) if self.focus == "sampled" else noise

    def ids_keep(self, attention: NDArray[Any] | None, noise: NDArray[np.float64]) -> NDArray[np.int64]:
        """`ids_keep` int64 [M, K] of one sample, ascending in each row, by its `noise` [M, L].

        Random masks are disjoint as long as M × K ≤ L, so that together they show each patch once.
        """
        if self.focus == "top-k" and attention is not None:
            best = np.argsort(-attention.astype(np.float64), kind="stable")[: self.keep]
            ids = np.tile(best, (len(noise), 1))
        elif self.focus == "sampled" and attention is not None:
            scores = np.log(np.maximum(attention, _FLOOR, dtype=np.float64)) + noise
            first = self.patches - self.keep
            ids = scores.argpartition(first, axis=1)[:, first:]
        elif self.count * self.keep <= self.patches:
            ids = np.argsort(noise[0])[: self.count * self.keep].reshape(self.count, self.keep)
        else:
            ids = np.argsort(noise, axis=1)[:, : self.keep].copy()
        ids.sort(axis=1)
        return ids.astype(np.int64, copy=False)


def select_visible(attention: Tensor, gumbel: Tensor | None, keep: int) -> Tensor:
    """`MaskSampler.ids_keep` on the device, where a live teacher's attention is; equal for the same fp16 attention.

    Args:
        attention: float [B, L], any positive scale.
        gumbel: float64 [B, L] of `MaskSampler.noise` for focus "sampled"; None for "top-k".

    Returns:
        int64 [B, keep], ascending in each row.
    """
    scores = attention.half().double()
    if gumbel is not None:
        scores = scores.clamp(min=_FLOOR).log() + gumbel
    return torch.argsort(-scores, dim=1, stable=True)[:, :keep].sort(dim=1).values
