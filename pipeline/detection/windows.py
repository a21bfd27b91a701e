"""Attention inside windows, by hooks on an encoder's blocks: its weights and their names stay.

Global attention over a 1024 px image compares 4,096 tokens with each other in every block. As in ViTDet (arXiv
2203.16527), most blocks attend inside windows instead, and a few see the whole image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import ConfigError


def quarter_ends(depth: int) -> tuple[int, ...]:
    """The last block of each quarter of the depth: 2, 5, 8, 11 of 12 blocks; 2, 5, 8, 10 of 11."""
    return tuple(sorted({math.ceil(quarter * depth / 4) - 1 for quarter in (1, 2, 3, 4)}))


def attend_in_windows(
    blocks: nn.ModuleList, grid: tuple[int, int], *, prefix: int, window: int, global_blocks: Sequence[int] | None
) -> None:
    """Make every block but `global_blocks` (by default `quarter_ends`) attend in windows only.

    Args:
        blocks: each with an `attn` module: ([B, prefix + h*w, D], attn_mask=...) → the same shape.
        grid: (h, w) cells of the image.
        prefix: tokens before the patches, such as a CLS token.
        window: side of a window in cells.

    Raises:
        ConfigError: there are no such blocks.
    """
    chosen = quarter_ends(len(blocks)) if global_blocks is None else tuple(global_blocks)
    if any(not 0 <= block < len(blocks) for block in chosen):
        raise ConfigError(f"global_blocks={list(chosen)}: name blocks from 0 to {len(blocks) - 1}")
    for index, block in enumerate(blocks):
        if index not in chosen:
            windows = Windows(grid, window, prefix)
            assert isinstance(block.attn, nn.Module)
            block.attn.register_forward_pre_hook(windows.cut, with_kwargs=True)
            block.attn.register_forward_hook(windows.join)


@dataclass(frozen=True)
class Windows:
    """How a grid is cut into windows. The last row and column of windows may reach beyond its edge.

    Prefix tokens take part in every window; their output is the mean over the windows. So one window over the grid is
    plain attention. Cells beyond the edge are never attended to.
    """

    grid: tuple[int, int]
    window: int
    prefix: int

    @property
    def padded(self) -> tuple[int, int]:
        """The grid, filled up to whole windows."""
        h, w = (math.ceil(side / self.window) * self.window for side in self.grid)
        return h, w

    def cut(self, _: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before attention: tokens [B, prefix + h*w, D] to [B*windows, prefix + window², D], and the mask."""
        x: Tensor = inputs[0]
        B = x.shape[0]
        cells = self._partition(x[:, self.prefix :].unflatten(1, self.grid))  # [B, n, window², D]
        head = x[:, None, : self.prefix].expand(-1, cells.shape[1], -1, -1)
        if self.padded != self.grid:
            inside = self._partition(torch.ones(1, *self.grid, 1, dtype=torch.bool, device=x.device)).squeeze(3)
            inside = F.pad(inside, (self.prefix, 0), value=True)  # [1, n, prefix + window²]
            options = {**options, "attn_mask": inside.expand(B, -1, -1).flatten(0, 1)[:, None, None]}
        return (torch.cat([head, cells], dim=2).flatten(0, 1), *inputs[1:]), options

    def join(self, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        """After attention: windows back to tokens [B, prefix + h*w, D]."""
        (h, w), (H, W) = self.grid, self.padded
        rows, columns = H // self.window, W // self.window
        x = output.unflatten(0, (-1, rows * columns))  # [B, n, prefix + window², D]
        cells = x[:, :, self.prefix :].unflatten(2, (self.window, self.window)).unflatten(1, (rows, columns))
        cells = cells.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)[:, :h, :w]  # [B, h, w, D]
        return torch.cat([x[:, :, : self.prefix].mean(1), cells.flatten(1, 2)], dim=1)

    def _partition(self, x: Tensor) -> Tensor:
        """[B, h, w, D] to [B, n, window², D], zeros beyond the edge."""
        (h, w), (H, W) = self.grid, self.padded
        x = F.pad(x, (0, 0, 0, W - w, 0, H - h))
        x = x.unflatten(2, (-1, self.window)).unflatten(1, (-1, self.window))  # [B, rows, window, columns, window, D]
        return x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
