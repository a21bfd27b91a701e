"""A teacher's maps on the student's grid, where the two differ: bilinear, as `torch.nn.functional.interpolate`."""

from torch import Tensor
from torch.nn import functional as F

Grid = tuple[int, int]  # (h, w) cells


def resize_tokens(tokens: Tensor, grid: Grid, to: Grid) -> Tensor:
    """Tokens [B, h*w, D] of one grid as [B, H*W, D] of another; equal grids change nothing."""
    if grid == to:
        return tokens
    maps = tokens.transpose(1, 2).unflatten(2, grid)  # [B, D, h, w]
    return F.interpolate(maps, to, mode="bilinear").flatten(2).transpose(1, 2)


def resize_attention(attention: Tensor, grid: Grid, to: Grid) -> Tensor:
    """Attention [B, h*w] of any float type as float16 [B, H*W]; equal grids change nothing.

    It starts from float16, which a cache holds, and computes in float64. So workers and devices agree on the masks.
    """
    if grid == to:
        return attention
    return resize_tokens(attention.half().double().unsqueeze(2), grid, to).squeeze(2).half()
