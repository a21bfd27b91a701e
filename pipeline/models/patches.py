"""Images as patches, strided convolutions on patches alone, and the fixed positions of the grid."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images [B, 3, H, W] into [B, L, patch*patch*3]; within a patch row, column, channel, as MAE orders them."""
    B, C, H, W = images.shape
    h, w = H // patch, W // patch
    cells = images.reshape(B, C, h, patch, w, patch).permute(0, 2, 4, 3, 5, 1)  # [B, h, w, p, p, C]
    return cells.reshape(B, h * w, patch * patch * C)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The inverse of `patchify`: [B, L, patch*patch*3] to [B, 3, H, W]."""
    B, _, size = patches.shape
    channels = size // (patch * patch)
    cells = patches.reshape(B, *grid, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)  # [B, C, h, p, w, p]
    return cells.reshape(B, channels, grid[0] * patch, grid[1] * patch)


def as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens [B, h*w, D], row by row, as a map [B, D, h, w]."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *grid)


def resize_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map [B, C, h, w] on another grid [B, C, H, W]: means of cells where it has as many or more, else bilinear."""
    if tuple(x.shape[2:]) == grid:
        return x
    if x.shape[2] >= grid[0] and x.shape[3] >= grid[1]:
        return F.adaptive_avg_pool2d(x, grid)
    return F.interpolate(x, grid, mode="bilinear")


def conv_in_cells(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Apply a convolution with equal stride and kernel to cells alone: none of its windows crosses a cell's border.

    Args:
        x: [B, K, side*side, C], each cell's pixels row by row.
        conv: kernel s × s, stride s, where s divides `side`.

    Returns:
        [B, K, (side/s)*(side/s), conv.out_channels], the numbers that `conv` gives on the whole map.
    """
    B, K, pixels, C = x.shape
    side, s = round(pixels**0.5), conv.kernel_size[0]
    small = side // s
    windows = x.view(B, K, small, s, small, s, C).permute(0, 1, 2, 4, 3, 5, 6).reshape(B, K, small * small, s * s * C)
    return F.linear(windows, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


def sincos_positions(dim: int, grid: tuple[int, int], prefix: int = 0) -> Tensor:
    """Fixed 2-D sine-cosine positions [1, prefix + h*w, dim] float32, zeros for prefix tokens, as in MAE.

    Half the channels code the column and half the row; each half is sines, then cosines, at the frequencies
    10000^(-i / (dim/4)), computed in double precision. timm's `build_sincos2d_pos_embed` computes them in float32 and
    orders the channels in another way.
    """
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = [axis.reshape(-1, 1).double() * omega for axis in (columns, rows)]  # each [L, dim/4]
    table = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
    return F.pad(table.float(), (0, 0, prefix, 0)).unsqueeze(0)
