"""The student's part of a config."""

from typing import Literal

from pydantic import Field

from pipeline.config import Config


class StudentConfig(Config):
    """Which encoder, and what differs from its published size."""

    name: str = "mrmae_vit_base_patch16"
    image_size: int = Field(224, ge=8, le=4096)  # pixels; views.image_size must equal it
    patch_size: int | None = Field(None, ge=1)
    dim: int | None = Field(None, ge=1)
    depth: int | None = Field(None, ge=1)
    num_heads: int | None = Field(None, ge=1)
    decoder_dim: int | None = Field(None, ge=1)
    decoder_depth: int | None = Field(None, ge=1)
    decoder_heads: int | None = Field(None, ge=1)
    gradient_checkpointing: bool = False  # about a third slower, for a fraction of the activations' memory


class MimicConfig(Config):
    """What the student learns from: MR-MAE's two losses and the variants that the ablation compares."""

    objective: Literal["mr_mae", "mae", "feature_decoder", "joint_decoder"] = "mr_mae"
    norm_pix_loss: bool = True  # reconstruct each patch normalised by its own mean and deviation
    fusion: Literal["fused", "each", "last"] = "fused"  # which blocks the mimic loss reaches, and how
    fusion_blocks: list[int] | None = None  # default: four, evenly spread
    target_norm: Literal["layernorm", "channel", "none"] = "layernorm"
    mimic_loss: Literal["smooth_l1", "mse", "cosine"] = "smooth_l1"
    mimic_head: Literal["linear", "mlp"] = "linear"
    mimic_weight: float = Field(10.0, ge=0)  # ten: measured, docs/results.md; at one the pixels drown it
    pixel_weight: float = Field(1.0, ge=0)
    teacher_weights: dict[str, float] | None = None  # by teacher name; default 1 each
    standardise_teachers: bool = True  # False: the naive joining that the paper found worse
    drop_teachers: bool = False  # train each sample on one teacher, drawn at random
