"""The hybrid encoder of ConvMAE (arXiv 2205.03892): two masked convolution levels, then transformer blocks.

Parameter names are those of Alpha-VL/ConvMAE, so its checkpoints load as they are; it calls a level a stage. Every
strided convolution is aligned with the patch, so only the 5 × 5 depthwise ones look beyond a cell. So there are two
paths with the same numbers:

- `sparse`, for training under a mask: all of levels 1 and 2 on the visible cells alone; only the depthwise
  convolution sees a map, zero where masked.
- `dense`, where nothing is masked, and as the sparse path's test oracle: whole maps, the depthwise input masked.
"""

from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.masking import gather_tokens, scatter_tokens, visible_map, visible_pixels
from pipeline.models.patches import as_map, conv_in_cells, patchify, sincos_positions
from pipeline.models.sizes import Size
from pipeline.models.vit import EncoderOutput, LayerNorm, apply, drop_rates, initialise, run_blocks, transformer


class ConvViT(nn.Module):
    """ConvMAE's encoder; no CLS token.

    The maps of levels 1 and 2 reach the decoder through their own convolutions, added to the last block's output
    before `norm`. Fine-tuning, probes and detection read the block output without that addition, so `tokens` and the
    mimic heads do too: through a LayerNorm without parameters, for `norm` is fitted to the sum.

    Args:
        size: three widths and depths. The strides of the levels are patch_size/4, 2 and 2.
        taps: blocks of the last level; `EncoderOutput.hidden` has their outputs.
        final_norm: False leaves out what only the decoder reads: the outputs of levels 1 and 2, and `norm`.
        sparse: which path a masked forward takes.
    """

    num_prefix_tokens = 0
    attention_query = "mean"

    def __init__(
        self,
        size: Size,
        *,
        drop_path: float = 0.0,
        taps: tuple[int, ...] = (),
        final_norm: bool = True,
        gradient_checkpointing: bool = False,
        sparse: bool = True,
    ) -> None:
        super().__init__()
        self.image_size, self.patch_size, self.grid, self.dim = size.image_size, size.patch_size, size.grid, size.dim[2]
        self.taps, self.gradient_checkpointing, self.sparse = taps, gradient_checkpointing, sparse
        dim, depth = size.dim, size.depth
        rates = drop_rates(drop_path, sum(depth))
        self.patch_embed1 = ConvEmbed(3, dim[0], size.patch_size // 4)
        self.patch_embed2 = ConvEmbed(dim[0], dim[1], 2)
        self.patch_embed3 = ConvEmbed(dim[1], dim[2], 2)
        self.patch_embed4 = nn.Linear(dim[2], dim[2])
        self.pos_embed = nn.Parameter(sincos_positions(dim[2], self.grid), requires_grad=False)
        self.blocks1 = nn.ModuleList(ConvBlock(dim[0], rate, size.conv_mlp_ratio) for rate in rates[: depth[0]])
        self.blocks2 = nn.ModuleList(
            ConvBlock(dim[1], rate, size.conv_mlp_ratio) for rate in rates[depth[0] : -depth[2]]
        )
        self.blocks3 = transformer(dim[2], size.num_heads, rates[-depth[2] :])
        if final_norm:
            self.stage1_output_decode = Conv2d(dim[0], dim[2], 4, stride=4)
            self.stage2_output_decode = Conv2d(dim[1], dim[2], 2, stride=2)
            self.norm = LayerNorm(dim[2])
        initialise(self)
        nn.init.xavier_uniform_(self.patch_embed3.proj.weight.data.flatten(1))

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, under the name that they have in a ViT."""
        return self.blocks3

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> EncoderOutput:
        """Encode images [B, 3, H, W] normalised float, at the cells `ids_keep` [B, K] int64 or at all of them."""
        x, fine = self._levels(images, ids_keep, decode=True)
        x, hidden = self._transformer(x, ids_keep)
        return EncoderOutput(latent=self.norm(x + fine[0] + fine[1]), hidden=hidden, last=x)

    def forward_blocks(self, images: Tensor, ids_keep: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """The last block's output [B, K, D], not normed, and the tapped blocks' patch tokens."""
        x, _ = self._levels(images, ids_keep, decode=False)
        return self._transformer(x, ids_keep)

    def pooled_norm(self) -> nn.Module:
        """A new norm for the mean of the tokens, which a classifier reads."""
        return LayerNorm(self.dim)

    def forward_tokens(self, images: Tensor) -> Tensor:
        """Every patch token of unmasked images [B, 3, H, W], LayerNormed without parameters: [B, L, D]."""
        return F.layer_norm(self.forward_blocks(images)[0], (self.dim,), eps=1e-6)

    @property
    def map_dims(self) -> tuple[int, ...]:
        """Channels of each map of `forward_maps`."""
        return self.patch_embed2.proj.in_channels, self.patch_embed3.proj.in_channels, self.dim

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """The levels' outputs, not normed, of unmasked images [B, 3, H, W]: maps [B, C, f*h, f*w], f = 4, 2, 1."""
        maps, x = [], images
        for level in (1, 2):
            x = self._level_dense(level, x, None)
            maps.append(x)
        x, _ = self._transformer(_tokens(self.patch_embed3(x)), None)
        return [*maps, as_map(x, self.grid)]

    def _transformer(self, x: Tensor, ids_keep: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        positions = self.pos_embed if ids_keep is None else self.pos_embed[0][ids_keep]  # [B, K, D]
        return run_blocks(self.blocks3, self.patch_embed4(x) + positions, self.taps, self.gradient_checkpointing)

    def _levels(self, images: Tensor, ids_keep: Tensor | None, decode: bool) -> tuple[Tensor, list[Tensor]]:
        """The third embedding [B, K, D] and, to `decode`, the outputs of levels 1 and 2, each [B, K, D]."""
        if ids_keep is None:
            return self._levels_dense(images, None, decode)
        if self.sparse:
            return self._levels_sparse(images, ids_keep, decode)
        x, outputs = self._levels_dense(images, ids_keep, decode)
        return gather_tokens(x, ids_keep), [gather_tokens(output, ids_keep) for output in outputs]

    def _levels_sparse(self, images: Tensor, ids_keep: Tensor, decode: bool) -> tuple[Tensor, list[Tensor]]:
        h, w = self.grid
        cells = gather_tokens(patchify(images, self.patch_size), ids_keep)  # [B, K, p*p*3]: masked pixels end here
        x, outputs = cells.view(*cells.shape[:2], -1, 3), []  # [B, K, p*p, 3]
        for level, factor in ((1, 4), (2, 2)):
            x = getattr(self, f"patch_embed{level}").forward_cells(x)  # [B, K, f*f, C]
            pixels, size = visible_pixels(ids_keep, self.grid, factor), (h * factor, w * factor)
            for block in getattr(self, f"blocks{level}"):
                x = apply(block.forward_cells, x, pixels, size, checkpointing=self.gradient_checkpointing)
            if decode:
                outputs.append(conv_in_cells(x, getattr(self, f"stage{level}_output_decode")).squeeze(2))
        return self.patch_embed3.forward_cells(x).squeeze(2), outputs

    def _levels_dense(self, images: Tensor, ids_keep: Tensor | None, decode: bool) -> tuple[Tensor, list[Tensor]]:
        x, outputs = images, []
        for level, factor in ((1, 4), (2, 2)):
            mask = None if ids_keep is None else visible_map(ids_keep, self.grid, factor)
            x = self._level_dense(level, x, mask)
            if decode:
                outputs.append(_tokens(getattr(self, f"stage{level}_output_decode")(x)))
        return _tokens(self.patch_embed3(x)), outputs

    def _level_dense(self, level: int, x: Tensor, mask: Tensor | None) -> Tensor:
        """One convolution level on whole maps: [B, C, s*H, s*W] to [B, C', H, W]."""
        x = getattr(self, f"patch_embed{level}")(x)
        for block in getattr(self, f"blocks{level}"):
            x = apply(block, x, mask, checkpointing=self.gradient_checkpointing)
        return x


class Conv2d(nn.Conv2d):
    """A convolution that gives its weight a gradient of the weight's memory layout.

    Maps are channels-last here. torch would give the gradient that layout too, and DDP would warn and copy it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, D, H', W']."""
        weight = self.weight.flatten(1).view_as(self.weight)  # the way back through this restores the layout
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)


class ConvEmbed(nn.Module):
    """Strided convolution, LayerNorm (torch's eps), GELU."""

    def __init__(self, channels: int, dim: int, stride: int) -> None:
        super().__init__()
        self.proj = Conv2d(channels, dim, stride, stride)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, D, H/s, W/s]."""
        return F.gelu(_over_channels(self.norm, self.proj(x)))

    def forward_cells(self, x: Tensor) -> Tensor:
        """The same on cells: [B, K, side*side, C] to [B, K, (side/s)*(side/s), D]."""
        return F.gelu(self.norm(conv_in_cells(x, self.proj)))


class ConvBlock(nn.Module):
    """A transformer block with a 5 × 5 depthwise convolution between two 1 × 1 as its attention; norms at torch's eps.

    All convolutions but `attn` are linear maps of one pixel, kept in the shape that checkpoints have.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.conv1 = Conv2d(dim, dim, 1)
        self.attn = Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv2 = Conv2d(dim, dim, 1)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = ConvMlp(dim, mlp_ratio * dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Whole maps [B, C, H, W]; `mask` [B, 1, H, W] is 1 where visible: the depthwise input is zero elsewhere."""
        mixed = self.conv1(_over_channels(self.norm1, x))
        mixed = self.conv2(self.attn(mixed if mask is None else mixed * mask))
        x = x + self.drop_path(mixed)
        x = x + self.drop_path(self.mlp(_over_channels(self.norm2, x)))
        return x

    def forward_cells(self, x: Tensor, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """The same on visible cells [B, K, side*side, C]; their pixels are at `pixels` in maps of `size` (H, W)."""
        shape = x.shape
        x = x.flatten(1, 2)  # [B, N, C]
        mixed = scatter_tokens(_linear(self.conv1, self.norm1(x)), pixels, size[0] * size[1])  # [B, H*W, C]
        mixed = self.attn(mixed.view(-1, *size, shape[-1]).permute(0, 3, 1, 2))  # [B, C, H, W], channels last in memory
        mixed = gather_tokens(mixed.permute(0, 2, 3, 1).flatten(1, 2), pixels)  # [B, N, C]
        x = x + self.drop_path(_linear(self.conv2, mixed))
        x = x + self.drop_path(self.mlp.forward_cells(self.norm2(x)))
        return x.view(shape)


class ConvMlp(nn.Module):
    """Two 1 × 1 convolutions with a GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Conv2d(dim, hidden, 1)
        self.fc2 = Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, H, W]."""
        x = self.fc2(F.gelu(self.fc1(x)))
        return x

    def forward_cells(self, x: Tensor) -> Tensor:
        """Pixels [B, N, C]."""
        return _linear(self.fc2, F.gelu(_linear(self.fc1, x)))


def _linear(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1 × 1 convolution on channels-last pixels."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def _over_channels(norm: nn.Module, x: Tensor) -> Tensor:
    """LayerNorm over the channels of a map [B, C, H, W]."""
    x = norm(x.permute(0, 2, 3, 1))
    return x.permute(0, 3, 1, 2)


def _tokens(x: Tensor) -> Tensor:
    """[B, D, h, w] to [B, L, D]."""
    return x.flatten(2).transpose(1, 2)
