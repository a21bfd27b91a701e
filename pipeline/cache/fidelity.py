"""How much of the teacher's tokens survives quantisation, measured on every extraction's own tokens."""

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pipeline.cache.quantiser import STD_FLOOR
from pipeline.errors import CacheError

_EPS = 1e-6  # of the affine-free LayerNorm that targets go through at the loss


class FidelityFigures(BaseModel):
    """What a commit record keeps.

    `nmse_*`: squared error of a channel over the variance of that channel; `cosine_*`: of tokens after an affine-free
    LayerNorm, which is how the mimic loss sees them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int
    nmse_mean: float
    nmse_worst: float  # the worst channel
    cosine_mean: float
    cosine_worst: float  # the worst token

    def check(self, max_nmse: float, min_cosine: float) -> None:
        """Fail when quantisation lost more than allowed.

        Raises:
            CacheError: naming both figures.
        """
        if not (self.nmse_worst <= max_nmse and self.cosine_mean >= min_cosine):
            raise CacheError(
                f"stored tokens are not faithful: worst channel NMSE {self.nmse_worst:.2g} (at most {max_nmse:.2g}), "
                f"cosine {self.cosine_mean:.5f} (at least {min_cosine:.5f}); calibrate on more images or use float16"
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
        )


class Fidelity:
    """Streaming meter: `update` with tokens and what became of them, then `figures()`."""

    def __init__(self) -> None:
        self._tokens = 0
        self._sums: Tensor | None = None  # float64 [3, D]: tokens, their squares, squared errors
        self._shift: Tensor | None = None  # near the mean, so that squares don't cancel
        self._cosine_sum, self._cosine_worst = 0.0, 1.0

    def update(self, tokens: Tensor, restored: Tensor) -> None:
        """Compare float tokens [..., L, D] with their dequantised selves, on whatever device they are."""
        dim = tokens.shape[-1]
        blocks = (torch.split(side.reshape(-1, dim), 4096) for side in (tokens, restored))
        for exact, stored in zip(*blocks, strict=True):
            self._add(exact.float(), stored.float())

    def _add(self, exact: Tensor, stored: Tensor) -> None:
        if self._shift is None:
            self._shift = exact.double().mean(0)
        centred, error = exact.double() - self._shift, (stored - exact).double()
        sums = torch.stack([centred.sum(0), centred.square().sum(0), error.square().sum(0)])
        self._sums = sums if self._sums is None else self._sums + sums
        dim = (exact.shape[-1],)
        layer_norm = torch.nn.functional.layer_norm
        a, b = layer_norm(exact, dim, eps=_EPS).double(), layer_norm(stored, dim, eps=_EPS).double()
        lengths = a.norm(dim=-1) * b.norm(dim=-1)
        # A token without any deviation has no direction: its normalised self is all zero on both sides.
        cosine = torch.where(lengths > 0, (a * b).sum(-1) / lengths.clamp(min=1e-12), 1.0)
        self._tokens += exact.shape[0]
        self._cosine_sum += float(cosine.sum())
        self._cosine_worst = min(self._cosine_worst, float(cosine.min()))

    def merge(self, other: "Fidelity") -> None:
        """Add what another meter saw."""
        if other._sums is None or other._shift is None:
            return
        if self._sums is None or self._shift is None:
            self._sums, self._shift = other._sums.clone(), other._shift
        else:
            self._sums = self._sums + other._shifted(self._shift)
        self._tokens += other._tokens
        self._cosine_sum += other._cosine_sum
        self._cosine_worst = min(self._cosine_worst, other._cosine_worst)

    def _shifted(self, shift: Tensor) -> Tensor:
        assert self._sums is not None
        assert self._shift is not None
        total, squares, errors = self._sums
        delta = self._shift - shift
        moved = squares + 2 * delta * total + self._tokens * delta.square()
        return torch.stack([total + self._tokens * delta, moved, errors])

    def figures(self) -> FidelityFigures:
        """The figures so far; of no tokens, a perfect set."""
        if self._sums is None:
            return FidelityFigures(tokens=0, nmse_mean=0.0, nmse_worst=0.0, cosine_mean=1.0, cosine_worst=1.0)
        total, squares, errors = self._sums / self._tokens
        variance = (squares - total.square()).clamp(min=0)
        floor = (STD_FLOOR**2) * float(variance.median())  # the quantiser's own floor
        nmse = errors / variance.clamp(min=floor if floor > 0 else 1.0)
        return FidelityFigures(
            tokens=self._tokens,
            nmse_mean=float(nmse.mean()),
            nmse_worst=float(nmse.max()),
            cosine_mean=self._cosine_sum / self._tokens,
            cosine_worst=self._cosine_worst,
        )

    def to_json(self) -> dict[str, Any]:
        return self.figures().model_dump()
