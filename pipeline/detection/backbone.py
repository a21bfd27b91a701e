"""A student's encoder as a detector's backbone: windows in its attention, five levels of features from its maps.

Levels lie at 4, 8, 16, 32 and 64 pixels a cell (for a patch of 16), all of the same width:

- an encoder with one map (ViT): ViTDet's simple feature pyramid (arXiv 2203.16527), every level from that map;
- one with three (ConvViT): its own maps and the last one max-pooled, as ConvMAE detects (arXiv 2205.03892), through a
  feature pyramid network.

The last level is the fourth, max-pooled.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from pipeline.detection.windows import attend_in_windows


class Encoder(Protocol):
    """What a backbone needs of an encoder, which is an `nn.Module`."""

    grid: tuple[int, int]
    patch_size: int
    num_prefix_tokens: int

    @property
    def blocks(self) -> nn.ModuleList: ...

    @property
    def map_dims(self) -> tuple[int, ...]: ...

    def forward_maps(self, images: Tensor) -> list[Tensor]: ...


class Backbone(nn.Module):
    """Images [B, 3, H, W] normalised float → levels "0" to "3" and "pool", float32 [B, channels, h, w] each.

    Args:
        encoder: changed in place: its blocks attend in windows from now on.
        channels: width of every level.
        window, global_blocks: see `attend_in_windows`.
    """

    def __init__(self, encoder: Encoder, *, channels: int, window: int, global_blocks: Sequence[int] | None) -> None:
        super().__init__()
        assert isinstance(encoder, nn.Module)
        attend_in_windows(
            encoder.blocks,
            encoder.grid,
            prefix=encoder.num_prefix_tokens,
            window=window,
            global_blocks=global_blocks,
        )
        self.encoder, self.out_channels = encoder, channels  # torchvision asks for out_channels
        dims = encoder.map_dims
        self.pyramid = SimplePyramid(dims[0], channels) if len(dims) == 1 else MapPyramid(dims, channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The output is float32 under autocast too: torchvision lays its anchors in the features' precision."""
        levels: dict[str, Tensor] = self.pyramid(self.encoder.forward_maps(images))
        return {name: level.float() for name, level in levels.items()}


class SimplePyramid(nn.Module):
    """ViTDet's pyramid: the one map enlarged 4× and 2×, as it is, and halved, each through its own two convolutions."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            [
                nn.Sequential(_double(dim, dim // 2), LayerNorm2d(dim // 2), nn.GELU(), _double(dim // 2, dim // 4)),
                _double(dim, dim // 2),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )
        self.outputs = nn.ModuleList(
            nn.Sequential(_normed(width, channels, 1), _normed(channels, channels, 3))
            for width in (dim // 4, dim // 2, dim, dim)
        )
        self.last = LastLevelMaxPool()

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        """One map [B, D, h, w] → five levels."""
        pairs = zip(self.scales, self.outputs, strict=True)
        levels, names = self.last([output(scale(maps[0])) for scale, output in pairs], maps, list("0123"))
        return dict(zip(names, levels, strict=True))


class MapPyramid(nn.Module):
    """torchvision's feature pyramid network on three maps and the last one halved."""

    def __init__(self, dims: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.fpn = FeaturePyramidNetwork([*dims, dims[-1]], channels, LastLevelMaxPool(), norm_layer=LayerNorm2d)

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        """Maps [B, C, 4h, 4w], [B, C', 2h, 2w], [B, D, h, w] → five levels."""
        four = [*maps, F.max_pool2d(maps[-1], 2)]
        return dict(self.fpn(OrderedDict(zip("0123", four, strict=True))))


def _double(dim: int, out: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(dim, out, 2, stride=2)


def _normed(dim: int, out: int, kernel: int) -> nn.Module:
    block: nn.Module = Conv2dNormActivation(dim, out, kernel, norm_layer=LayerNorm2d, activation_layer=None)
    return block
