"""Which patches stay visible: drawn from the teacher's attention, in the worker, as a function of (seed, epoch, index).

Focused mimicking (MR-MAE, arXiv 2303.05475) keeps the patches that the teacher attends to. Sampling k of them without
replacement, with probability proportional to attention, is one sort: add Gumbel noise to the log-probabilities and
take the k largest (Efraimidis and Spirakis 2006; Kool et al., arXiv 1903.06059).
"""

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.rng import Stream, uniforms

Focus = Literal["sampled", "top-k", "random"]

# Attention arrives as fp16: a patch that rounds to zero must stay possible, and its logarithm finite.
_FLOOR = 1e-8


def draw_masks(
    attention: NDArray[Any] | None, patches: int, keep: int, focus: Focus, seed: int, epoch: int, index: int, count: int
) -> NDArray[np.int64]:
    """`ids_keep` int64 [count, keep]: the visible patches of `count` masks of one sample, ascending in each row.

    `attention` is float [patches], any positive scale; None is allowed with focus "random" alone. Random masks of one
    sample are disjoint as long as count × keep ≤ patches, so that together they show each patch once.
    """
    if focus == "top-k" and attention is not None:
        scores = np.asarray(attention, dtype=np.float64)
        ids = np.broadcast_to(np.argsort(-scores, kind="stable")[:keep], (count, keep))
    elif focus == "sampled" and attention is not None:
        logits = np.log(np.maximum(np.asarray(attention, dtype=np.float64), _FLOOR))
        scores = logits + gumbel_noise(patches, seed, epoch, index, count)
        ids = np.argpartition(-scores, keep - 1, axis=1)[:, :keep]
    else:
        noise = uniforms(count * patches, Stream.MASK, seed, epoch, index).reshape(count, patches)
        ids = _split_permutation(noise, keep)
    return np.sort(ids, axis=1).astype(np.int64, copy=False)


def gumbel_noise(patches: int, seed: int, epoch: int, index: int, count: int) -> NDArray[np.float64]:
    """What is added to a sample's log-attention before the largest are taken: float64 [count, patches]."""
    noise = uniforms(count * patches, Stream.MASK, seed, epoch, index).reshape(count, patches)
    return -np.log(-np.log(noise))


def select_visible(attention: Tensor, gumbel: Tensor | None, keep: int) -> Tensor:
    """`draw_masks` on the device, where a live teacher's attention is: the same patches for the same fp16 attention.

    Args:
        attention: float [B, L], any positive scale.
        gumbel: float64 [B, L] of `gumbel_noise` for focus "sampled"; None for "top-k".

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
    return np.argsort(noise, axis=1)[:, :keep]
