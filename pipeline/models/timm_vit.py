"""Plain ViTs of timm as students: the VisionTransformer and Eva families, among them DINOv2, DINOv3, SigLIP and EVA-02.

A masked forward gathers the visible patches before they are embedded, with their positions: learned or sine-cosine
ones, rotary ones (arXiv 2104.09864), or both. With all patches visible it gives the numbers of timm's own forward.
Parameters have timm's names. What a model has after its final norm (pooling, head) is left out.
"""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from pipeline.models.masking import gather_tokens
from pipeline.models.patches import conv_in_cells, patchify
from pipeline.models.sizes import Size
from pipeline.models.timm_names import OwnPixels, TimmModel
from pipeline.models.vit import PlainViT, run_blocks


class TimmViT(PlainViT):
    """A plain ViT of timm; see `PlainViT` for what it offers.

    It takes images as all students do, normalised by ImageNet's mean and deviation, and brings them to the mean and
    deviation of its own pretraining.

    Args:
        named: what timm has under the student's name.
        size: with what differs from it.
        drop_path, taps, final_norm, gradient_checkpointing: as for `pipeline.models.vit.ViT`.
    """

    def __init__(
        self,
        named: TimmModel,
        size: Size,
        *,
        drop_path: float = 0.0,
        taps: tuple[int, ...] = (),
        final_norm: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(size, taps, gradient_checkpointing)
        self.named, self.changes = named, size_changes(named, size)
        model: Any = timm.create_model(
            named.name, num_classes=0, img_size=size.image_size, drop_path_rate=drop_path, **self.changes
        )
        self.family = type(model)
        self.num_prefix_tokens = model.num_prefix_tokens
        self.attention_query = "mean" if model.cls_token is None else "cls"
        self.patch_embed, self.norm_pre = model.patch_embed, model.norm_pre
        self.cls_token, self.reg_token, self.pos_embed = model.cls_token, model.reg_token, model.pos_embed
        self.rope = getattr(model, "rope", None)
        self.blocks = nn.ModuleList(model.blocks)
        # Models that norm the mean of their tokens call their norm fc_norm.
        norm: nn.Module = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
        self.norm = norm if final_norm else nn.Identity()
        self._pooled_norm = [norm]  # in a list, which registers no module
        self.to_own = OwnPixels(named)

    def own_pixels(self, images: Tensor) -> Tensor:
        """See `PlainViT.own_pixels`."""
        pixels: Tensor = self.to_own(images)
        return pixels

    def pooled_norm(self) -> nn.Module:
        """A norm of the model's own kind, for the mean of its tokens."""
        return self._pooled_norm[0]

    def forward_blocks(self, images: Tensor, ids_keep: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """The last block's output [B, prefix+K, D], not normed, and the tapped blocks' patch tokens."""
        patches = patchify(self.own_pixels(images), self.patch_size)  # [B, L, p*p*3]
        if ids_keep is not None:
            patches = gather_tokens(patches, ids_keep)  # [B, K, p*p*3]: masked pixels end here
        x = conv_in_cells(patches.unflatten(2, (-1, 3)), self.patch_embed.proj).squeeze(2)  # [B, K, D]
        x = self.patch_embed.norm(x)
        x = self.norm_pre(self._with_positions(x, ids_keep))
        x, outputs = run_blocks(self.blocks, x, self.taps, self.gradient_checkpointing, self._rotary(ids_keep))
        return x, [output[:, self.num_prefix_tokens :] for output in outputs]

    def _with_positions(self, x: Tensor, ids_keep: Tensor | None) -> Tensor:
        """Patch tokens [B, K, D] and the prefix tokens before them, with the positions that are added to tokens."""
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        if self.pos_embed is not None:
            in_front = self.pos_embed.shape[1] - self.grid[0] * self.grid[1]  # 0: prefix tokens have no positions
            positions = self.pos_embed[:, in_front:]
            x = x + (positions if ids_keep is None else positions[0][ids_keep])
            if in_front:
                prefix = [torch.cat(prefix, dim=1) + self.pos_embed[:, :in_front]]
        return torch.cat([*(token.to(x.dtype) for token in prefix), x], dim=1)

    def _rotary(self, ids_keep: Tensor | None) -> list[Tensor] | None:
        """Rotary positions for each block, if the model has them.

        timm has them for the whole grid, [L, 2d], or for each block and head, [depth, H, L, 2d]. Of the visible cells
        they are [B, 1 or H, K, 2d].
        """
        if self.rope is None:
            return None
        kept = getattr(self.rope, "feat_shape", None) is not None
        angles: Tensor = self.rope.get_embed() if kept else self.rope.get_embed(shape=list(self.grid))
        if angles.ndim == 4:
            visible = angles if ids_keep is None else angles[:, :, ids_keep].transpose(1, 2)  # [depth, B, H, K, 2d]
            return list(visible.unbind(0))
        return [angles if ids_keep is None else angles[ids_keep].unsqueeze(1)] * len(self.blocks)


def size_changes(named: TimmModel, size: Size) -> dict[str, Any]:
    """The arguments by which timm builds a model of this size; empty if only the image's size differs."""
    sizes = {
        "patch_size": (size.patch_size, named.patch_size),
        "embed_dim": (size.dim[-1], named.dim),
        "depth": (size.depth[-1], named.depth),
        "num_heads": (size.num_heads, named.num_heads),
    }
    return {argument: wanted for argument, (wanted, usual) in sizes.items() if wanted != usual}
