"""The plain ViT encoder of MAE (arXiv 2111.06377): visible patches in, tokens out.

Parameter names are those of facebookresearch/mae, so its checkpoints load as they are.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipeline.models.masking import gather_tokens
from pipeline.models.patches import as_map, conv_in_cells, patchify, sincos_positions
from pipeline.models.sizes import Size

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class EncoderOutput(NamedTuple):
    """What an encoder gives for K visible cells (all L of them without a mask), in `ids_keep` order."""

    latent: Tensor  # [B, prefix + K, D], normed: what the decoder reads
    hidden: list[Tensor]  # one [B, K, D] for each block in `taps`: its patch tokens as they left it, not normed
    last: Tensor  # [B, prefix + K, D], the last block's output, not normed


class PlainViT(nn.Module):
    """What every plain ViT offers on top of `forward_blocks`: one grid of patch tokens after its prefix tokens."""

    num_prefix_tokens: int
    attention_query: str
    blocks: nn.ModuleList
    norm: nn.Module

    def __init__(self, size: Size, taps: tuple[int, ...], gradient_checkpointing: bool) -> None:
        super().__init__()
        self.image_size, self.patch_size, self.grid, self.dim = size.image_size, size.patch_size, size.grid, size.dim[0]
        self.taps, self.gradient_checkpointing = taps, gradient_checkpointing

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> EncoderOutput:
        """Encode images [B, 3, H, W] normalised float, at the cells `ids_keep` [B, K] int64 or at all of them."""
        x, hidden = self.forward_blocks(images, ids_keep)
        return EncoderOutput(latent=self.norm(x), hidden=hidden, last=x)

    def forward_blocks(self, images: Tensor, ids_keep: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """The last block's output [B, prefix+K, D], not normed, and the tapped blocks' patch tokens."""
        raise NotImplementedError

    def own_pixels(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] as students take them, normalised as the weights were trained."""
        return images

    def pooled_norm(self) -> nn.Module:
        """A new norm for the mean of the tokens, which a classifier reads."""
        return LayerNorm(self.dim)

    def forward_tokens(self, images: Tensor) -> Tensor:
        """Every patch token of unmasked images [B, 3, H, W], through `norm`: [B, L, D]."""
        return self.forward(images).latent[:, self.num_prefix_tokens :]

    @property
    def map_dims(self) -> tuple[int, ...]:
        """Channels of each map of `forward_maps`."""
        return (self.dim,)

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """The last block's output, not normed, of unmasked images [B, 3, H, W] as one map [B, D, h, w]."""
        return [as_map(self.forward_blocks(images)[0][:, self.num_prefix_tokens :], self.grid)]


class ViT(PlainViT):
    """MAE's encoder: linear patch embedding, CLS token, fixed 2-D sine-cosine positions, pre-norm blocks.

    Args:
        taps: blocks; `EncoderOutput.hidden` has their outputs.
        final_norm: False leaves `norm` out, for a classifier that norms after pooling.
    """

    num_prefix_tokens = 1
    attention_query = "cls"

    def __init__(
        self,
        size: Size,
        *,
        drop_path: float = 0.0,
        taps: tuple[int, ...] = (),
        final_norm: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(size, taps, gradient_checkpointing)
        dim = self.dim
        self.patch_embed = PatchEmbed(size.patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_positions(dim, self.grid, prefix=1), requires_grad=False)
        self.mlp_ratio = size.mlp_ratio
        self.blocks = transformer(dim, size.num_heads, drop_rates(drop_path, size.depth[0]), size.mlp_ratio)
        self.norm = LayerNorm(dim) if final_norm else nn.Identity()
        initialise(self)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))  # as if it were the linear map it is

    def forward_blocks(self, images: Tensor, ids_keep: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """See `PlainViT.forward_blocks`."""
        patches = patchify(images, self.patch_size)  # [B, L, p*p*3]
        positions = self.pos_embed[:, 1:]
        if ids_keep is not None:
            patches = gather_tokens(patches, ids_keep)  # [B, K, p*p*3]: masked pixels end here
            positions = self.pos_embed[0, 1:][ids_keep]  # [B, K, D]
        x = self.patch_embed(patches) + positions
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = torch.cat([cls.to(x.dtype), x], dim=1)  # [B, 1+K, D]
        x, outputs = run_blocks(self.blocks, x, self.taps, self.gradient_checkpointing)
        return x, [output[:, 1:] for output in outputs]


class PatchEmbed(nn.Module):
    """One linear map for each patch, kept as the strided convolution that checkpoints hold."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """[B, K, p*p*3] to [B, K, D]."""
        return conv_in_cells(patches.view(*patches.shape[:2], -1, 3), self.proj).squeeze(2)


def drop_rates(last: float, depth: int) -> list[float]:
    """Stochastic depth that grows linearly from 0 at the first block to `last` at the last.

    In double precision: timm's `calculate_drop_path_rates` rounds to float32, which changes the last bits of a run.
    """
    return [last * block / max(depth - 1, 1) for block in range(depth)]


def transformer(dim: int, num_heads: int, drop_path: Iterable[float], mlp_ratio: float = 4.0) -> nn.ModuleList:
    """timm blocks as MAE configures them: biased qkv, LayerNorm eps 1e-6; one for each drop-path rate."""
    options: dict[str, Any] = {"qkv_bias": True, "norm_layer": LayerNorm}  # declared a class, but any callable serves
    return nn.ModuleList(Block(dim, num_heads, mlp_ratio, drop_path=rate, **options) for rate in drop_path)


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    taps: tuple[int, ...] = (),
    checkpointing: bool = False,
    rotary: Sequence[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Apply blocks in order; also return the outputs of those in `taps`, in the order of the blocks.

    `rotary` has the rotary positions that each block takes beside its tokens, if the blocks take any.
    """
    tapped = []
    for index, block in enumerate(blocks):
        x = apply(block, x, *([] if rotary is None else [rotary[index]]), checkpointing=checkpointing)
        if index in taps:
            tapped.append(x)
    return x, tapped


def attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Multi-head attention of [B, P, D] to keys and values [B, N, D], before its output map: [B, P, D]."""
    query, key, value = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def block_at(block: Block, x: Tensor, rows: Tensor) -> Tensor:
    """A block's output at the rows [B, P] int64 of x [B, N, D]: [B, P, D]. Other rows are keys and values only.

    The block is one of `transformer` without drop path.
    """
    attn: Any = block.attn
    dim, normed = x.shape[-1], block.norm1(x)
    weight, bias = attn.qkv.weight, attn.qkv.bias
    query = F.linear(gather_tokens(normed, rows), weight[:dim], bias[:dim])
    key, value = F.linear(normed, weight[dim:], bias[dim:]).chunk(2, dim=-1)
    x = gather_tokens(x, rows) + attn.proj(attention(query, key, value, attn.num_heads))
    x = x + block.mlp(block.norm2(x))
    return x


def apply(block: Callable[..., Tensor], *inputs: object, checkpointing: bool) -> Tensor:
    """Run a block. With `checkpointing`, only its inputs are kept for the backward pass, which runs it again."""
    if checkpointing and torch.is_grad_enabled():
        output: Tensor = checkpoint(block, *inputs, use_reentrant=False)
        return output
    return block(*inputs)


def initialise(module: nn.Module) -> None:
    """Xavier-uniform linear maps with zero bias, after the JAX ViT, as the reference code does; norms start at 1, 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
