"""Which patches stay visible: drawn from the teacher's attention, in the worker, as a function of (seed, epoch, index).

Focused mimicking (MR-MAE, arXiv 2303.05475) keeps the patches that the teacher attends to. Sampling k of them without
replacement, with probability proportional to attention, is one sort: add Gumbel noise to the log-probabilities and
take the k largest (Efraimidis and Spirakis 2006; Kool et al., arXiv 1903.06059).
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

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
    noise = uniforms(count * patches, Stream.MASK, seed, epoch, index).reshape(count, patches)
    if focus == "random" or attention is None:
        ids = _split_permutation(noise, keep)
    elif focus == "top-k":
        scores = np.asarray(attention, dtype=np.float64)
        ids = np.broadcast_to(np.argsort(-scores, kind="stable")[:keep], (count, keep))
    else:
        scores = np.log(np.maximum(np.asarray(attention, dtype=np.float64), _FLOOR)) - np.log(-np.log(noise))
        ids = np.argpartition(-scores, keep - 1, axis=1)[:, :keep]
    return np.sort(ids, axis=1).astype(np.int64, copy=False)


def _split_permutation(noise: NDArray[np.float64], keep: int) -> NDArray[np.int64]:
    count, patches = noise.shape
    if count * keep <= patches:
        return np.argsort(noise[0])[: count * keep].reshape(count, keep)
    return np.argsort(noise, axis=1)[:, :keep]
