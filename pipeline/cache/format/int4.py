"""Standardised tokens in four bits a channel: rotated, so that all channels are alike, then rounded to 16 levels.

A channel of a rotated token is a sum over all channels of the token, so it is nearly Gaussian, whatever the teacher.
Divided by the token's rms, it is rounded to the levels that lose least of a standard Gaussian: those of Lloyd (1957)
and Max (Quantizing for minimum distortion, 1960), which lose 0.95% of its variance. Turning back spreads the error
evenly over the channels.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import CacheError

SCALE_FLOOR = 2.0**-14  # the smallest normal float16: a zero token keeps a scale that divides
_POSITIVE = (0.12839503, 0.3880483, 0.65675912, 0.94234046, 1.2562312, 1.61804639, 2.06901723, 2.73258957)
LEVELS = np.array([-level for level in reversed(_POSITIVE)] + list(_POSITIVE), np.float32)  # ascending


def packed_width(dim: int) -> int:
    """Bytes of a token of `dim` channels. Raises CacheError for an odd number."""
    if dim % 2:
        raise CacheError(f"int4 packs two channels in a byte, and the teacher has {dim}: use the int8 quantiser")
    return dim // 2


def rotation(dim: int) -> NDArray[np.float64]:
    """The orthogonal matrix [dim, dim]: the discrete Hartley transform, its columns with signs as if drawn by chance.

    Any width has one (a Hadamard matrix exists for some alone), and a formula gives it: nothing is drawn or stored.
    """
    channel = np.arange(dim)
    angle = 2 * np.pi * (np.outer(channel, channel) % dim) / dim
    signs = np.where(np.sin(channel**2) < 0, -1.0, 1.0)
    hartley: NDArray[np.float64] = (np.cos(angle) + np.sin(angle)) / np.sqrt(dim)
    return hartley * signs


class Int4:
    """The code of tokens with `dim` channels, its constants on one device. Nothing here waits for an accelerator."""

    def __init__(self, dim: int, device: torch.device) -> None:
        self._rotation = torch.tensor(rotation(dim), dtype=torch.float32, device=device)
        self._edges = torch.tensor((LEVELS[1:] + LEVELS[:-1]) / 2, device=device)
        codes = np.arange(256)
        self._pairs = torch.tensor(LEVELS[np.stack([codes & 15, codes >> 4], 1)], device=device)  # of each byte

    def encode(self, standardised: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens float32 [..., L, D] → packed uint8 [..., L, D/2], scale float16 [..., L]."""
        with _full_precision(standardised.device):
            rotated = standardised @ self._rotation.T
        scale = rotated.square().mean(-1).sqrt().clamp(min=SCALE_FLOOR).half()
        codes = torch.bucketize(rotated / scale.float().unsqueeze(-1), self._edges, out_int32=True).to(torch.uint8)
        return codes[..., 0::2] | codes[..., 1::2] << 4, scale

    def decode(self, packed: Tensor, scale: Tensor) -> Tensor:
        """The inverse: packed [..., L, D/2] and scale [..., L] → float32 [..., L, D]."""
        rotated = torch.nn.functional.embedding(packed.int(), self._pairs).flatten(-2)
        with _full_precision(packed.device):
            return rotated.mul_(scale.float().unsqueeze(-1)) @ self._rotation


def _full_precision(device: torch.device) -> Any:
    """Without autocast, which would make targets of 8 bits of precision and another type."""
    return torch.autocast(device.type, enabled=False)
