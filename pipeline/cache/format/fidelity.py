"""How much of the teacher's tokens survives quantisation, measured on every extraction's own tokens."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pipeline.cache.format.quantiser import STD_FLOOR
from pipeline.errors import CacheError

_EPS = 1e-6  # of the affine-free LayerNorm that targets go through at the loss


class FidelityFigures(BaseModel):
    """What a commit record keeps.

    `nmse_*`: squared error of a channel over the variance of that channel, in the shard or in calibration, whichever is
    larger: a shard of a few blank images hardly varies. `cosine_*`: of tokens after an affine-free LayerNorm, which is
    how the mimic loss sees them. `summary`: the same figures of class tokens, where the cache keeps them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int
    nmse_mean: float
    nmse_worst: float  # the worst channel
    cosine_mean: float
    cosine_worst: float  # the worst token
    summary: "FidelityFigures | None" = None

    def check(self, max_nmse: float, min_cosine: float) -> None:
        """Fail when quantisation lost more than allowed.

        Raises:
            CacheError: naming both figures.
        """
        for what, figures in (("tokens", self), ("class tokens", self.summary)):
            if figures and not (figures.nmse_worst <= max_nmse and figures.cosine_mean >= min_cosine):
                raise CacheError(
                    f"stored {what} are not faithful: worst channel NMSE {figures.nmse_worst:.2g} (at most "
                    f"{max_nmse:.2g}), cosine {figures.cosine_mean:.5f} (at least {min_cosine:.5f}); calibrate on more "
                    "images or use float16"
                )

    @staticmethod
    def merge(shards: Iterable[dict[str, Any]]) -> "FidelityFigures | None":
        """Figures of several shards: means weighted by tokens, the worst of the worst. None of none."""
        figures = [FidelityFigures(**shard) for shard in shards if shard and shard["tokens"]]
        total = sum(f.tokens for f in figures)
        if not total:
            return None
        return FidelityFigures(
            tokens=total,
            nmse_mean=sum(f.nmse_mean * f.tokens for f in figures) / total,
            nmse_worst=max(f.nmse_worst for f in figures),
            cosine_mean=sum(f.cosine_mean * f.tokens for f in figures) / total,
            cosine_worst=min(f.cosine_worst for f in figures),
            summary=FidelityFigures.merge(f.summary.model_dump() for f in figures if f.summary),
        )


class _Sums(NamedTuple):
    """What a meter has summed up, on the device of the tokens: nothing here waits for an accelerator."""

    shift: Tensor  # float64 [D], near the mean, so that squares don't cancel
    channels: Tensor  # float64 [3, D]: shifted tokens, their squares, squared errors
    cosines: Tensor  # float64 [2]: sum, least

    def shifted(self, shift: Tensor, count: int) -> Tensor:
        """`channels` of the same `count` tokens around another shift."""
        total, squares, errors = self.channels
        delta = self.shift - shift
        moved = squares + 2 * delta * total + count * delta.square()
        return torch.stack([total + count * delta, moved, errors])


class Fidelity:
    """Streaming meter: `update` with tokens and what became of them, then `figures()`."""

    def __init__(self) -> None:
        self._tokens = 0
        self._sums: _Sums | None = None

    def update(self, tokens: Tensor, restored: Tensor) -> None:
        """Compare float tokens [..., L, D] with their dequantised selves, on whatever device they are."""
        dim = tokens.shape[-1]
        blocks = (torch.split(side.reshape(-1, dim), 4096) for side in (tokens, restored))
        for exact, stored in zip(*blocks, strict=True):
            self._add(_measure(exact.float(), stored.float(), self._sums), exact.shape[0])

    def merge(self, other: "Fidelity") -> None:
        """Add the sums of another meter, which must be on the same device."""
        if other._sums is not None:
            self._add(other._sums, other._tokens)

    def map(self, move: Callable[[Tensor], Tensor]) -> "Fidelity":
        """The same meter with its tensors moved, for instance to the host."""
        moved = Fidelity()
        moved._tokens = self._tokens
        moved._sums = None if self._sums is None else _Sums(*(move(values) for values in self._sums))
        return moved

    def _add(self, new: _Sums, count: int) -> None:
        self._tokens += count
        if self._sums is None:
            self._sums = new
            return
        shift, channels, cosines = self._sums
        total, least = cosines + new.cosines, torch.minimum(cosines, new.cosines)
        self._sums = _Sums(shift, channels + new.shifted(shift, count), torch.stack([total[0], least[1]]))

    def figures(self, std: NDArray[np.float32] | None = None) -> FidelityFigures:
        """The figures so far; of no tokens, a perfect set.

        Args:
            std: float32 [D], the channels' deviations in calibration, where there was one.
        """
        if self._sums is None:
            return FidelityFigures(tokens=0, nmse_mean=0.0, nmse_worst=0.0, cosine_mean=1.0, cosine_worst=1.0)
        total, squares, errors = self._sums.channels / self._tokens
        variance = (squares - total.square()).clamp(min=0)
        if std is not None and std.size:
            variance = variance.maximum(torch.from_numpy(std).to(variance).square())
        floor = (STD_FLOOR**2) * float(variance.median())  # the quantiser's own floor
        nmse = errors / variance.clamp(min=floor if floor > 0 else 1.0)
        return FidelityFigures(
            tokens=self._tokens,
            nmse_mean=float(nmse.mean()),
            nmse_worst=float(nmse.max()),
            cosine_mean=float(self._sums.cosines[0]) / self._tokens,
            cosine_worst=min(1.0, float(self._sums.cosines[1])),
        )


def _measure(exact: Tensor, stored: Tensor, former: _Sums | None) -> _Sums:
    """Sums over tokens float32 [n, D] and their stored selves."""
    shift = exact.double().mean(0) if former is None else former.shift
    centred, error = exact.double() - shift, (stored - exact).double()
    channels = torch.stack([centred.sum(0), centred.square().sum(0), error.square().sum(0)])
    dim = (exact.shape[-1],)
    layer_norm = torch.nn.functional.layer_norm
    a, b = layer_norm(exact, dim, eps=_EPS).double(), layer_norm(stored, dim, eps=_EPS).double()
    lengths = a.norm(dim=-1) * b.norm(dim=-1)
    # A token without any deviation has no direction: its normalised self is all zero on both sides.
    cosine = torch.where(lengths > 0, (a * b).sum(-1) / lengths.clamp(min=1e-12), 1.0)
    return _Sums(shift, channels, torch.stack([cosine.sum(), cosine.min()]))
