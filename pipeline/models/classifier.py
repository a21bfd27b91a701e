"""A classifier on a student's encoder, for fine-tuning, and the layer numbers that layer-wise lr decay needs."""

from typing import Any

from torch import Tensor, nn

from pipeline.models.convvit import ConvViT
from pipeline.models.flat import flatten_parts
from pipeline.models.vit import LayerNorm, ViT


class Classifier(nn.Module):
    """Encoder, pooling, norm, linear head, under the reference code's names; built by `build_classifier`.

    Mean pooling averages the last block's patch tokens and norms the mean by `fc_norm`; "cls" takes the CLS token
    through the encoder's `norm`. For ConvViT the stage-1/2 addition of pre-training is left out. Positions start from
    sine-cosine and are trained, as in the reference fine-tuning.

    Args:
        encoder: built with `final_norm` for "cls" pooling alone.
        pool: "mean" | "cls".
        spec: the keyword arguments that rebuild this model.
    """

    def __init__(self, encoder: ViT | ConvViT, num_classes: int, *, pool: str, spec: dict[str, Any]) -> None:
        super().__init__()
        self.encoder, self.pool, self.spec = encoder, pool, spec
        if pool == "mean":
            self.fc_norm = LayerNorm(encoder.dim)
        self.head = nn.Linear(encoder.dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # the first predictions are uniform: MAE's fine-tuning
        nn.init.zeros_(self.head.bias)
        encoder.pos_embed.requires_grad_(True)
        flatten_parts(self, "encoder")

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, 3, H, W] normalised float."""
        x, _ = self.encoder.forward_blocks(images)  # [B, prefix+L, D]
        patches = x[:, self.num_prefix_tokens :]
        pooled = self.encoder.norm(x)[:, 0] if self.pool == "cls" else self.fc_norm(patches.mean(1))  # [B, D]
        logits: Tensor = self.head(pooled)
        return logits

    def forward_tokens(self, images: Tensor) -> Tensor:
        """Every patch token through the norm that this classifier was trained with: [B, L, D]."""
        x, _ = self.encoder.forward_blocks(images)
        norm = self.fc_norm if self.pool == "mean" else self.encoder.norm
        tokens: Tensor = norm(x[:, self.num_prefix_tokens :])
        return tokens

    @property
    def attention_query(self) -> str:
        """Whose attention tells where this model looks: "cls", or "mean" over all queries."""
        return self.pool

    @property
    def dim(self) -> int:
        """Channels of a token."""
        return self.encoder.dim

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) cells."""
        return self.encoder.grid

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.encoder.image_size

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks."""
        return self.encoder.blocks

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: 1 for a CLS token, else 0."""
        return self.encoder.num_prefix_tokens


def layer_ids(model: Classifier) -> tuple[dict[str, int], int]:
    """The layer of every parameter, and the number of layers N, for learning rates lr × decay^(N - layer).

    Layer 0 is all before the transformer blocks (embeddings, positions, ConvViT's convolution stages), block i is
    layer i + 1, and what follows the blocks is layer N = blocks + 1, as in BEiT, MAE and ConvMAE.
    """
    last = len(model.blocks) + 1
    block_of = {id(p): i + 1 for i, block in enumerate(model.blocks) for p in block.parameters()}
    after = {id(p) for name, p in model.named_parameters() if name.startswith(("head.", "fc_norm.", "encoder.norm."))}
    ids = {name: last if id(p) in after else block_of.get(id(p), 0) for name, p in model.named_parameters()}
    return ids, last
