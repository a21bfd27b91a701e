"""A token as the number of its cluster: two bytes, whatever the teacher's width.

The codebook is the centroids of a k-means over standardised tokens: without that, the few channels of the largest
deviations would decide alone. Targets of this kind are BEiT v2's (arXiv 2208.06366, a learned codebook) and CAPI's
(arXiv 2502.08769, online clusters).
"""

import base64
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import CacheError

MAX_CLUSTERS = 2**16 - 1  # the last number of 16 bits stands for a token that is not finite
_TOKENS_PER_CLUSTER = 50  # that a codebook is fitted to, at least; FAISS asks for 39
MAX_VALUES = 1 << 26  # of a codebook, which are 179 MB of base64
_ITERATIONS = 20
_BLOCK = 4096  # tokens that are compared with all centroids at once


def samples_for(clusters: int, tokens: int, samples: int) -> int:
    """How many views of so many tokens a codebook is fitted to: `samples`, or more."""
    return max(samples, math.ceil(_TOKENS_PER_CLUSTER * clusters / tokens))


def fit_codebook(tokens: Tensor, clusters: int) -> NDArray[np.float16]:
    """The centroids float16 [K, D] of standardised tokens float32 [N, D], by Lloyd's k-means from K random tokens.

    It runs on the device of the tokens, and gives the same bits again there. A cluster that loses its last token takes
    the token that is farthest from its centroid.

    Raises:
        CacheError: there are fewer tokens than clusters, or the codebook would be too large for cache.json.
    """
    if clusters * tokens.shape[1] > MAX_VALUES:
        raise CacheError(
            f"calibration: a codebook of {clusters} x {tokens.shape[1]} numbers is more than cache.json may hold "
            f"({MAX_VALUES}): give fewer clusters"
        )
    if len(tokens) < clusters:
        raise CacheError(
            f"calibration: {len(tokens)} tokens are too few for {clusters} clusters: give more images, or fewer "
            "clusters"
        )
    start = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))[:clusters]
    centroids = tokens[start.to(tokens.device)]
    for _ in range(_ITERATIONS):
        ids, distances = _nearest(tokens, centroids)
        counts = ids.bincount(minlength=clusters)
        # Sums of sorted rows: index_add_ would add them in another order each time on an accelerator.
        centroids = F.embedding_bag(ids.argsort(stable=True), tokens, counts.cumsum(0) - counts, mode="mean")
        empty = (counts == 0).nonzero().squeeze(1)
        centroids[empty] = tokens[distances.topk(len(empty)).indices]
    return centroids.half().cpu().numpy()


def encode_base64(centroids: NDArray[np.float16]) -> str:
    """A codebook as it stands in cache.json: its float16 values, little-endian, row by row."""
    return base64.b64encode(centroids.astype("<f2").tobytes()).decode("ascii")


def decode_base64(text: Any, clusters: Any, dim: int) -> NDArray[np.float16]:
    """The inverse, [clusters, dim]. Raises CacheError where the text is no such codebook."""
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), "<f2")
        if len(values) != clusters * dim:
            raise ValueError("another size")
        return values.astype(np.float16).reshape(clusters, dim)
    except (TypeError, ValueError) as error:
        raise CacheError(f"quantiser: centroids must be base64 of {clusters} x {dim} float16 numbers") from error


class Codes:
    """The code of tokens by a codebook [K, D], its constants on one device. Nothing here waits for an accelerator."""

    def __init__(self, centroids: NDArray[np.float16], device: torch.device) -> None:
        self._centroids = torch.tensor(centroids, device=device).float()
        # Row K is what a token that is not finite stands for, and a number of no cluster.
        self._table = F.pad(self._centroids, (0, 0, 0, 1), value=torch.nan)

    def encode(self, standardised: Tensor) -> tuple[Tensor, None]:
        """Tokens float32 [..., L, D] → uint16 [..., L, 1], the nearest centroids; K where a token is not finite."""
        flat = standardised.flatten(0, -2)
        ids, _ = _nearest(flat, self._centroids)
        ids = ids.masked_fill(~flat.isfinite().all(-1), len(self._centroids))
        return ids.to(torch.uint16).view(*standardised.shape[:-1], 1), None

    def decode(self, ids: Tensor) -> Tensor:
        """uint16 [..., L, 1] → float32 [..., L, D], the centroids."""
        return F.embedding(ids.squeeze(-1).int().clamp(max=len(self._centroids)), self._table)


def _nearest(tokens: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's nearest centroid int64 [N], and a number [N] that grows with the distance to it."""
    ids, distances = [], []
    half_squares = centroids.square().sum(-1) / 2
    for block in torch.split(tokens, _BLOCK):
        with torch.autocast(tokens.device.type, enabled=False):  # in 8 bits, another centroid is often the nearest
            score, nearest = torch.addmm(-half_squares, block, centroids.T).max(-1)  # (|x|² - |x - c|²) / 2
        ids.append(nearest)
        distances.append(block.square().sum(-1) / 2 - score)
    return torch.cat(ids), torch.cat(distances)
