"""A classifier on a student's encoder, for fine-tuning, and the layer numbers that layer-wise lr decay needs."""

from typing import Any

from torch import Tensor, nn

from pipeline.models.feature_map import FeatureMap
from pipeline.models.flat import flatten_parts
from pipeline.models.mr_mae import Encoder


class Classifier(nn.Module):
    """Encoder, pooling, norm, linear head, under the reference code's names; built by `build_classifier`.

    Mean pooling averages the last block's patch tokens and norms the mean by `fc_norm`; "cls" takes the CLS token
    through the encoder's `norm`. ConvViT's levels 1 and 2 are not added to the last, as they are in pre-training.
    Positions start from sine-cosine and are trained, as in the reference fine-tuning.

    Args:
        encoder: built with `final_norm` for "cls" pooling alone.
        pool: "mean" | "cls".
        spec: the keyword arguments that rebuild this model.
    """

    def __init__(self, encoder: Encoder, num_classes: int, *, pool: str, spec: dict[str, Any]) -> None:
        super().__init__()
        self.encoder, self.pool, self.spec = encoder, pool, spec
        # What a `mrmae:` teacher is asked for, beside `blocks` and `forward_tokens`.
        self.dim, self.grid, self.image_size = encoder.dim, encoder.grid, encoder.image_size
        self.num_prefix_tokens, self.attention_query = encoder.num_prefix_tokens, pool
        if pool == "mean":
            self.fc_norm = encoder.pooled_norm()
        self.head = nn.Linear(encoder.dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # the first predictions are uniform: MAE's fine-tuning
        nn.init.zeros_(self.head.bias)
        if encoder.pos_embed is not None:
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
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks."""
        return self.encoder.blocks


def layer_ids(model: Classifier) -> tuple[dict[str, int], int]:
    """The layer of every parameter, and the number of layers N, for learning rates lr × decay^(N - layer).

    As in BEiT, MAE and ConvMAE. Layer 0 is all that comes before the transformer blocks: embeddings, positions,
    ConvViT's convolution levels. Block i is layer i + 1. What follows the blocks is layer N = blocks + 1.
    A network of timm that is no ViT has its stages as layers, as timm groups them.
    """
    if isinstance(model.encoder, FeatureMap):
        stages, last = model.encoder.layers()
        return {name: stages.get(name.removeprefix("encoder."), last) for name, _ in model.named_parameters()}, last
    last = len(model.blocks) + 1
    block_of = {id(p): i + 1 for i, block in enumerate(model.blocks) for p in block.parameters()}
    after = {id(p) for name, p in model.named_parameters() if name.startswith(("head.", "fc_norm.", "encoder.norm."))}
    ids = {name: last if id(p) in after else block_of.get(id(p), 0) for name, p in model.named_parameters()}
    return ids, last
