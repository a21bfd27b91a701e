"""The student and its objective."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from pipeline.config import Config
from pipeline.configs.objectives import check_objective

DecoderKind = Literal["full", "cross"]
DropTeachers = bool | Literal["loss"]
ObjectiveName = Literal["mr_mae", "mae", "feature_encoder", "feature_decoder", "joint_decoder", "distil"]
Fusion = Literal["fused", "each", "last"]
TargetNorm = Literal["layernorm", "channel", "phi_s", "none"]
MimicLoss = Literal["smooth_l1", "mse", "cosine"]
SummarySource = Literal["class", "mean"]
MimicHead = Literal["linear", "mlp"]
MimicTarget = Literal["tokens", "codes"]
MIMIC_LOSS: MimicLoss = "mse"
TARGET_SCALE = 4.0  # measured: docs/results.md. With 1 no weight reaches what this one does


class StudentConfig(Config):
    """Which encoder, and what differs from its published size."""

    main_key: ClassVar[str] = "name"

    name: str = "mrmae_vit_base_patch16"  # architecture and size, or timm:NAME: docs/students.md
    image_size: int | None = Field(None, ge=8, le=4096)  # pixels; default: in pretrain those of the views, else 224
    patch_size: int | None = Field(None, ge=1)  # pixels; default: 16, in pretrain what gives the teachers' grid
    dim: int | None = Field(None, ge=1)  # width of the encoder; default of this and the next ones: the published size
    depth: int | None = Field(None, ge=1)  # blocks of the encoder
    num_heads: int | None = Field(None, ge=1)  # attention heads of the encoder
    conv_mlp_ratio: int | None = Field(None, ge=1)  # hidden over outer width in ConvViT's first two levels; default: 4
    # full: MAE's; cross: queries of predicted cells read the visible tokens, and a ViT-B step takes 0.63 of MAE's time
    decoder: DecoderKind = "full"
    predict_share: float | None = Field(None, gt=0, le=1)  # of all cells; default: 1 (all masked ones), cross: 0.25
    decoder_dim: int | None = Field(None, ge=1)  # width of the decoder
    decoder_depth: int | None = Field(None, ge=1)  # blocks of the decoder
    decoder_heads: int | None = Field(None, ge=1)  # attention heads of the decoder
    gradient_checkpointing: bool = False  # about a third slower, for a fraction of the activations' memory


class MimicConfig(Config):
    """The objective: MR-MAE's two losses and the variants that the ablation compares."""

    # mr_mae: mimic the teacher and reconstruct pixels; mae: pixels alone; distil: mimic on whole views, any network;
    # the others: see docs/students.md; also a name that a plug-in registers (docs/python.md)
    objective: Annotated[ObjectiveName | str, AfterValidator(check_objective)] = "mr_mae"
    target: MimicTarget = "tokens"  # codes: classify each token's cluster, as a cache with cache.quantiser=codes has it
    norm_pix_loss: bool = True  # reconstruct each patch normalised by its own mean and deviation
    fusion: Fusion = "fused"  # which blocks the mimic loss reaches, and how
    fusion_blocks: list[int] | None = None  # default: four, evenly spread
    target_norm: TargetNorm = "layernorm"  # how the teacher's tokens are normalised
    target_scale: float = Field(TARGET_SCALE, gt=0)  # of the normalised target: a larger one asks more of the encoder
    resize_targets: Literal["bilinear"] | None = None  # teachers on another grid than the student's; null: refuse them
    mimic_loss: MimicLoss = MIMIC_LOSS  # between prediction and target
    mimic_head: MimicHead = "linear"  # what maps the student's tokens to the teacher's width
    mimic_weight: float = Field(1.0, ge=0)  # of the mimic loss
    summary_weight: float = Field(0.0, ge=0)  # of the loss on the teachers' class tokens (cache.summary=true)
    summary_source: SummarySource | None = None  # what predicts them; default: the student's class token, if it has one
    pixel_weight: float = Field(1.0, ge=0)  # of the pixel loss
    teacher_weights: dict[str, float] | None = None  # by teacher name; default 1 each
    standardise_teachers: bool = True  # False: the naive joining that the paper found worse
    drop_teachers: DropTeachers = False  # true: one teacher a sample, at random; loss: the worst, and half the others
