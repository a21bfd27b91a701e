"""Teacher tokens to what the cache stores, and back: int8 (the default), int4, codes, float16, float32.

int8, int4 and codes standardise each channel with statistics of a few images, because channel deviations of real tokens
span a factor of sixty. int8 then scales each token symmetrically to ±127 with one float16 scale; for the others see
`pipeline.cache.format.int4` and `pipeline.cache.format.codes`. All run where the tokens are.
"""

from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.cache.format.codes import MAX_CLUSTERS, Codes, decode_base64, encode_base64, fit_codebook
from pipeline.cache.format.int4 import SCALE_FLOOR, Int4, packed_width
from pipeline.configs.cache import QuantiserName
from pipeline.errors import CacheError

STD_FLOOR = 1e-2  # × the median deviation: a channel that is constant in calibration may move later
LEVELS = 127  # of int8, on each side of zero


class _Constants(NamedTuple):
    """What quantising needs on one device."""

    mean: Tensor
    std: Tensor
    code: Int4 | Codes | None


class Quantiser:
    """Maps tokens [..., L, D] to stored tokens and an optional scale [..., L], and back.

    Args:
        name: int8, int4, codes, float16 or float32.
        mean, std: float32 [D], for int8, int4 and codes; both empty means not calibrated yet.
        centroids: float16 [K, D] of standardised tokens, for codes.
    """

    def __init__(
        self,
        name: str,
        mean: NDArray[np.float32] | None = None,
        std: NDArray[np.float32] | None = None,
        centroids: NDArray[np.float16] | None = None,
    ) -> None:
        names = get_args(QuantiserName)
        if name not in names:
            raise CacheError(f"quantiser '{name}' is not one of {', '.join(names)}")
        empty = np.empty(0, np.float32)
        self.name = name
        self.mean = empty if mean is None else np.asarray(mean, np.float32)
        self.std = empty if std is None else np.asarray(std, np.float32)
        if self.mean.ndim != 1 or self.mean.shape != self.std.shape:
            raise CacheError("quantiser: mean and std must be two lists of equal length")
        if not np.isfinite(self.mean).all() or not (np.isfinite(self.std).all() and (self.std > 0).all()):
            raise CacheError("quantiser: mean and std must be finite, and std above zero")
        self.centroids = np.empty((0, 0), np.float16) if centroids is None else centroids
        if name == "codes" and self.mean.size:
            self._check_centroids()
        self.width(len(self.mean))
        self._on: dict[torch.device, _Constants] = {}

    def _check_centroids(self) -> None:
        clusters, dim = self.centroids.shape
        if not 2 <= clusters <= MAX_CLUSTERS or dim != len(self.mean) or not np.isfinite(self.centroids).all():
            raise CacheError(f"quantiser: centroids must be 2 to {MAX_CLUSTERS} rows of finite numbers, one a channel")

    @classmethod
    def calibrate(cls, name: str, tokens: Tensor, clusters: int = 0) -> "Quantiser":
        """Measure channel statistics on tokens [N, L, D] of a few images (16 do, 256 are the default of extraction).

        For codes, also fit a codebook of so many `clusters`.
        """
        if not cls(name).standardises:
            return cls(name)
        flat = tokens.reshape(-1, tokens.shape[-1])
        if flat.shape[0] == 0 or not torch.isfinite(flat).all():
            raise CacheError("calibration: the teacher gave no tokens, or some that are not finite; check its weights")
        blocks = torch.split(flat, 4096)  # float64 sums without a float64 copy of everything
        mean = torch.stack([block.double().sum(0) for block in blocks]).sum(0) / flat.shape[0]
        squares = torch.stack([(block.double() - mean).square().sum(0) for block in blocks]).sum(0)
        std = (squares / flat.shape[0]).sqrt()
        floor = STD_FLOOR * std.median()
        std = std.clamp(min=float(floor) if floor > 0 else 1.0)
        mean, std = mean.float(), std.float()
        centroids = fit_codebook((flat.float() - mean) / std, clusters) if name == "codes" else None
        return cls(name, mean.cpu().numpy(), std.cpu().numpy(), centroids)

    @property
    def calibrated(self) -> bool:
        return not self.standardises or len(self.mean) > 0

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type of stored tokens, little-endian."""
        return np.dtype({"int8": "i1", "int4": "u1", "codes": "<u2", "float16": "<f2", "float32": "<f4"}[self.name])

    @property
    def standardises(self) -> bool:
        """Whether channels are standardised first, by `mean` and `std`."""
        return self.name in ("int8", "int4", "codes")

    @property
    def has_scale(self) -> bool:
        """Whether each token has a scale."""
        return self.name in ("int8", "int4")

    @property
    def clusters(self) -> int:
        """K, centroids of the codebook; 0 without one."""
        return len(self.centroids)

    def width(self, dim: int) -> int:
        """Items of a stored token of `dim` channels. Raises CacheError where int4 can't pack them."""
        if self.name == "codes":
            return 1
        return packed_width(dim) if self.name == "int4" else dim

    def sound(self, stored: NDArray[Any]) -> bool:
        """Whether stored tokens are what `quantise` makes of finite ones: finite, or numbers of clusters."""
        if stored.dtype.kind == "f":
            return bool(np.isfinite(stored).all())
        return not self.clusters or int(stored.max()) < self.clusters

    def quantise(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens float [..., L, D] → (stored [..., L, width], scale float16 [..., L] or None), on the same device.

        Nothing here waits for an accelerator. Tokens that are not finite, or too large to store, give a scale that is
        not finite; where there is no scale, a stored token that is not `sound`.
        """
        if self.name == "float32":
            return tokens.float(), None
        if self.name == "float16":
            return tokens.half(), None
        mean, std, code = self._constants(tokens.device)
        standardised = (tokens.float() - mean) / std
        if code is not None:
            return code.encode(standardised)
        scale = (standardised.abs().amax(-1) / LEVELS).clamp(min=SCALE_FLOOR).half()
        # Dividing by the rounded scale, which is what the reader multiplies by, keeps the error within half a step.
        stored = (standardised / scale.float().unsqueeze(-1)).round().clamp(-LEVELS, LEVELS).to(torch.int8)
        return stored, scale

    def dequantise(self, stored: Tensor | NDArray[Any], scale: Tensor | NDArray[Any] | None) -> Any:
        """Stored tokens [..., L, width] and scale [..., L] → float32 [..., L, D]; arrays give arrays, else tensors."""
        if isinstance(stored, np.ndarray):
            tensor_scale = None if scale is None else torch.from_numpy(scale)
            return self.dequantise(torch.from_numpy(stored), tensor_scale).numpy()
        if not self.standardises:
            return stored.float()
        mean, std, code = self._constants(stored.device)
        if isinstance(code, Codes):
            values = code.decode(stored)
        else:
            assert isinstance(scale, Tensor)
            values = code.decode(stored, scale) if code else stored.float().mul_(scale.float().unsqueeze(-1))
        return values.mul_(std).add_(mean)

    def _constants(self, device: torch.device) -> _Constants:
        if not self.calibrated:
            raise CacheError(f"the {self.name} quantiser has no channel statistics: calibrate it first")
        if device not in self._on:
            mean, std = torch.tensor(self.mean, device=device), torch.tensor(self.std, device=device)
            code: Int4 | Codes | None = None
            if self.name == "int4":
                code = Int4(len(self.mean), device)
            elif self.name == "codes":
                code = Codes(self.centroids, device)
            self._on[device] = _Constants(mean, std, code)
        return self._on[device]

    def to_json(self) -> dict[str, Any]:
        """Exact: every float32 survives as the double that equals it."""
        if not self.standardises or not self.calibrated:
            return {"name": self.name}
        state = {"name": self.name, "mean": self.mean.tolist(), "std": self.std.tolist()}
        if self.name == "codes":
            state |= {"clusters": self.clusters, "centroids": encode_base64(self.centroids)}
        return state

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> "Quantiser":
        """Inverse of `to_json`; other keys of the section are ignored."""
        try:
            mean, std = (np.asarray(state.get(key, []), np.float32) for key in ("mean", "std"))
        except (TypeError, ValueError, OverflowError) as error:
            raise CacheError("quantiser: mean and std must be lists of numbers") from error
        centroids = None
        if state.get("name") == "codes" and mean.size:
            centroids = decode_base64(state.get("centroids"), state.get("clusters"), mean.size)
        return cls(str(state.get("name")), mean, std, centroids)
