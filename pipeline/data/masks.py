"""Which patches stay visible: drawn from the teacher's attention, in the worker, as a function of (seed, epoch, index).

Focused mimicking (MR-MAE, arXiv 2303.05475) keeps the patches that the teacher attends to. Sampling k of them without
replacement, with probability proportional to attention, is one sort: add Gumbel noise to the log-probabilities and
take the k largest (Efraimidis and Spirakis 2006; Kool et al., arXiv 1903.06059).
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.rng import Stream, uniforms_of_each

Focus = Literal["sampled", "top-k", "random"]

# Attention arrives as fp16: a patch that rounds to zero must stay possible, and its logarithm finite.
_FLOOR = 1e-8


def visible_count(patches: int, mask_ratio: float) -> int:
    """How many of `patches` stay visible: patches × (1 - mask_ratio), rounded down as in MAE, and at least one.

    Up to what rounding errors take away: 1 - 0.8 is a little less than 0.2, but a fifth of 400 patches is 80.
    """
    return max(1, math.floor(patches * (1 - mask_ratio) + 1e-9))


def draw_masks(
    attention: NDArray[Any] | None,
    samples: Sequence[tuple[int, int]],
    patches: int,
    keep: int,
    focus: Focus,
    seed: int,
    count: int = 1,
) -> NDArray[np.int64]:
    """`ids_keep` int64 [B, count, keep]: the visible patches of `count` masks of each sample, a pair (epoch, index).

    `attention` is float [B, patches], any positive scale; None is allowed with focus "random" alone.
    """
    noise = mask_noise(samples, patches, focus, seed, count)
    rows = [None] * len(samples) if attention is None else attention
    return np.stack([visible_patches(row, own, keep, focus) for row, own in zip(rows, noise, strict=True)])


def mask_noise(
    samples: Sequence[tuple[int, int]], patches: int, focus: Focus, seed: int, count: int = 1
) -> NDArray[np.float64]:
    """What is random in the masks of some samples (epoch, index), whatever their attention: [B, count, patches].

    Uniform in (0, 1); for focus "sampled" Gumbel, to be added to the attention's logarithm.
    """
    noise = uniforms_of_each(count * patches, Stream.MASK, seed, samples).reshape(len(samples), count, patches)
    return -np.log(-np.log(noise)) if focus == "sampled" else noise


def visible_patches(
    attention: NDArray[Any] | None, noise: NDArray[np.float64], keep: int, focus: Focus
) -> NDArray[np.int64]:
    """`ids_keep` int64 [count, keep] of one sample, ascending in each row, by its `mask_noise` [count, patches].

    Random masks are disjoint as long as count × keep ≤ patches, so that together they show each patch once.
    """
    if focus == "top-k" and attention is not None:
        ids = np.tile(np.argsort(-attention.astype(np.float64), kind="stable")[:keep], (len(noise), 1))
    elif focus == "sampled" and attention is not None:
        scores = np.log(np.maximum(attention, _FLOOR, dtype=np.float64)) + noise
        first = scores.shape[1] - keep
        ids = scores.argpartition(first, axis=1)[:, first:]
    else:
        ids = _split_permutation(noise, keep)
    ids.sort(axis=1)
    return ids.astype(np.int64, copy=False)


def select_visible(attention: Tensor, gumbel: Tensor | None, keep: int) -> Tensor:
    """`draw_masks` on the device, where a live teacher's attention is: the same patches for the same fp16 attention.

    Args:
        attention: float [B, L], any positive scale.
        gumbel: float64 [B, L] of `mask_noise` for focus "sampled"; None for "top-k".

    Returns:
        int64 [B, keep], ascending in each row.
    """
    scores = attention.half().double()
    if gumbel is not None:
        scores = scores.clamp(min=_FLOOR).log() + gumbel
    return torch.argsort(-scores, dim=1, stable=True)[:, :keep].sort(dim=1).values


def _split_permutation(noise: NDArray[np.float64], keep: int) -> NDArray[np.int64]:
    count, patches = noise.shape
    if count * keep <= patches:
        return np.argsort(noise[0])[: count * keep].reshape(count, keep)
    return np.argsort(noise, axis=1)[:, :keep].copy()
