"""MAE's decoder and pixel loss (arXiv 2111.06377): put mask tokens at the masked cells, decode, regress pixels."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.masking import gather_tokens, restore
from pipeline.models.patches import sincos_positions
from pipeline.models.sizes import Size
from pipeline.models.vit import LayerNorm, apply, block_at, initialise, run_blocks, transformer


class Decoder(nn.Module):
    """A narrow transformer over all cells; its parts carry the names that MAE's and ConvMAE's checkpoints use.

    Args:
        prefix: tokens before the patches in the latent (1: CLS, 0: none).
        pixels: False leaves `decoder_pred` out, where no pixels are predicted.
    """

    def __init__(self, size: Size, *, prefix: int, pixels: bool = True, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        dim = size.decoder_dim
        self.length, self.prefix, self.dim = size.grid[0] * size.grid[1], prefix, dim
        self.gradient_checkpointing = gradient_checkpointing
        self.decoder_embed = nn.Linear(size.dim[-1], dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(dim, size.grid, prefix), requires_grad=False)
        self.add_blocks(size)
        self.decoder_norm = LayerNorm(dim)
        if pixels:
            self.decoder_pred = nn.Linear(dim, size.patch_size**2 * 3)
        initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def add_blocks(self, size: Size) -> None:
        """Add the blocks, at their place among the parameters."""
        self.decoder_blocks = transformer(self.dim, size.decoder_heads, [0.0] * size.decoder_depth)

    def forward(self, latent: Tensor, ids_keep: Tensor, cells: Tensor | None = None) -> Tensor:
        """From the latent [B, prefix + K, D] of the visible cells `ids_keep` [B, K] int64 to normed tokens.

        Returns:
            [B, P, d] of the cells [B, P] int64; [B, L, d] of all cells without them. Where fewer cells are asked for
            than are masked, the last block computes those alone. It could leave out the visible ones too, but then sums
            would have another order, and runs of before would not go on to the same bits.
        """
        x = self.decoder_embed(latent)  # [B, prefix+K, d]
        prefix, visible = x[:, : self.prefix], x[:, self.prefix :]
        x = torch.cat([prefix, restore(visible, ids_keep, self.length, self.mask_token)], dim=1)  # [B, prefix+L, d]
        x, checkpointing = x + self.decoder_pos_embed, self.gradient_checkpointing
        tokens: Tensor
        if cells is not None and cells.shape[1] < self.length - ids_keep.shape[1]:
            x, _ = run_blocks(self.decoder_blocks[:-1], x, checkpointing=checkpointing)
            x = apply(block_at, self.decoder_blocks[-1], x, cells + self.prefix, checkpointing=checkpointing)
            tokens = self.decoder_norm(x)
            return tokens
        x, _ = run_blocks(self.decoder_blocks, x, checkpointing=checkpointing)
        tokens = self.decoder_norm(x[:, self.prefix :])
        return tokens if cells is None else gather_tokens(tokens, cells)

    def predict_pixels(self, x: Tensor) -> Tensor:
        """Tokens [B, N, d] to pixels [B, N, p*p*3], within a patch in the order of `patchify`."""
        x = self.decoder_pred(x)
        return x


def pixel_loss(pred: Tensor, target: Tensor, norm_pix_loss: bool) -> Tensor:
    """Mean squared error in fp32 between predicted and true patches, both [B, M, p*p*3]: a scalar.

    With `norm_pix_loss` each true patch is standardised by its own mean and unbiased variance, eps 1e-6, as in MAE.
    """
    target = target.float()
    if norm_pix_loss:
        # LayerNorm is one pass, but divides by the biased variance: the unbiased one is n / (n - 1) times that.
        n = target.shape[-1]
        share = (n - 1) / n
        target = F.layer_norm(target, (n,), target.new_full((n,), share**0.5), eps=1e-6 * share)
    return F.mse_loss(pred.float(), target)
