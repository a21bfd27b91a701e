"""The student's part of a config."""

from typing import Literal

from pydantic import Field

from pipeline.config import Config
from pipeline.models.mimic import MIMIC_WEIGHT, Fusion, MimicHead, MimicLoss, TargetNorm
from pipeline.models.mr_mae import DropTeachers, ObjectiveName
from pipeline.models.summary import SummarySource


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
    """The objective: MR-MAE's two losses and the variants that the ablation compares."""

    objective: ObjectiveName = "mr_mae"
    norm_pix_loss: bool = True  # reconstruct each patch normalised by its own mean and deviation
    fusion: Fusion = "fused"  # which blocks the mimic loss reaches, and how
    fusion_blocks: list[int] | None = None  # default: four, evenly spread
    target_norm: TargetNorm = "layernorm"
    resize_targets: Literal["bilinear"] | None = None  # teachers on another grid than the student's; null: refuse them
    mimic_loss: MimicLoss = "smooth_l1"
    mimic_head: MimicHead = "linear"
    mimic_weight: float = Field(MIMIC_WEIGHT, ge=0)
    pixel_weight: float = Field(1.0, ge=0)
    summary_weight: float = Field(0.0, ge=0)  # of the loss on the teachers' class tokens (cache.summary=true)
    summary_source: SummarySource | None = None  # what predicts them; default: the student's class token, if it has one
    teacher_weights: dict[str, float] | None = None  # by teacher name; default 1 each
    standardise_teachers: bool = True  # False: the naive joining that the paper found worse
    drop_teachers: DropTeachers = False  # true: one teacher a sample, at random; loss: the worst, and half the others
