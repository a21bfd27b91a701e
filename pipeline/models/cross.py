"""CrossMAE's decoder (arXiv 2401.14391): queries of the predicted cells read the visible tokens, and no others."""

import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from pipeline.models.mae import Decoder
from pipeline.models.sizes import Size
from pipeline.models.vit import LayerNorm, apply, attention


class CrossDecoder(Decoder):
    """MAE's decoder with other blocks. It costs what is predicted: no token stands for a cell that isn't.

    A query is the mask token plus the position of its cell. Keys and values come from the embedded latent plus the
    positions of the visible cells. Queries don't see each other, so the prediction of a cell is the same whichever
    other cells are predicted.
    """

    def add_blocks(self, size: Size) -> None:
        """Add the blocks, under a name of their own: a full decoder's would fit them in part."""
        self.decoder_cross_blocks = nn.ModuleList(
            CrossBlock(self.dim, size.decoder_heads) for _ in range(size.decoder_depth)
        )

    def forward(self, latent: Tensor, ids_keep: Tensor, cells: Tensor | None = None) -> Tensor:
        """See `Decoder.forward`."""
        positions = self.decoder_pos_embed[0, self.prefix :]  # [L, d]
        prefix = self.decoder_pos_embed[:, : self.prefix].expand(len(latent), -1, -1)
        memory = self.decoder_embed(latent) + torch.cat([prefix, positions[ids_keep]], dim=1)  # [B, prefix+K, d]
        asked = positions.expand(len(latent), -1, -1) if cells is None else positions[cells]  # [B, P, d]
        x = self.mask_token + asked
        for block in self.decoder_cross_blocks:
            x = apply(block, x, memory, checkpointing=self.gradient_checkpointing)
        tokens: Tensor = self.decoder_norm(x)
        return tokens


class CrossBlock(nn.Module):
    """Cross-attention and MLP, each after a LayerNorm and beside a residual connection; ratio and biases as in MAE."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = CrossAttention(dim, num_heads)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Queries [B, P, d] that read a memory [B, M, d], which is not normed: [B, P, d]."""
        x = x + self.attn(self.norm1(x), memory)
        x = x + self.mlp(self.norm2(x))
        return x


class CrossAttention(nn.Module):
    """Multi-head attention of queries to a memory."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Queries [B, P, d] and memory [B, M, d] to [B, P, d]."""
        key, value = self.kv(memory).chunk(2, dim=-1)
        x = self.proj(attention(self.q(x), key, value, self.num_heads))
        return x
