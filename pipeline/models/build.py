"""Students and classifiers by name: `build_student` for pre-training, `build_classifier` for fine-tuning."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Unpack, get_args

from torch import nn

from pipeline.configs.models import (
    MIMIC_LOSS,
    TARGET_SCALE,
    DecoderKind,
    DropTeachers,
    Fusion,
    MimicHead,
    MimicLoss,
    MimicTarget,
    SummarySource,
    TargetNorm,
)
from pipeline.configs.objectives import OBJECTIVES, Objective, check_objective
from pipeline.errors import ConfigError
from pipeline.models.classifier import Classifier
from pipeline.models.convvit import ConvViT
from pipeline.models.cross import CrossDecoder
from pipeline.models.feature_map import FeatureMap
from pipeline.models.mae import Decoder
from pipeline.models.mimic import CodeMimic, Mimic
from pipeline.models.mr_mae import Encoder, Student, module_name
from pipeline.models.sizes import EncoderSizes, Size, StudentSizes, check_choice, resolve_size
from pipeline.models.spec import spec_of
from pipeline.models.summary import SummaryHead
from pipeline.models.timm_names import is_timm, timm_model
from pipeline.models.timm_vit import TimmViT, size_changes
from pipeline.models.vit import ViT

_DECODERS = {"full": Decoder, "cross": CrossDecoder}
_PREDICT_SHARES = {"full": 1.0, "cross": 0.25}
_DEFAULT_LOSSES = (MIMIC_LOSS, "smooth_l1")  # of now, and of the specs of earlier versions


def build_student(
    name: str,
    *,
    objective: str = "mr_mae",
    target: MimicTarget = "tokens",
    norm_pix_loss: bool = True,
    teachers: Mapping[str, int] | None = None,
    teacher_weights: Mapping[str, float] | None = None,
    fusion: Fusion = "fused",
    fusion_blocks: Sequence[int] | None = None,
    target_norm: TargetNorm = "layernorm",
    target_scale: float = TARGET_SCALE,
    mimic_loss: MimicLoss = MIMIC_LOSS,
    mimic_head: MimicHead = "linear",
    mimic_weight: float = 1.0,
    pixel_weight: float = 1.0,
    summary_weight: float = 0.0,
    summary_source: SummarySource | None = None,
    standardise_teachers: bool = True,
    drop_teachers: DropTeachers = False,
    decoder: DecoderKind = "full",
    predict_share: float | None = None,
    gradient_checkpointing: bool = False,
    sparse: bool = True,
    grid: Sequence[int] | None = None,
    **sizes: Unpack[StudentSizes],
) -> Student:
    """Build a student for pre-training.

    Args:
        name: one of `sizes.SIZES`, or `timm:NAME`: a plain ViT of timm, for objective "distil" any of its networks.
        objective: see `pipeline.models.mr_mae`, or a name that a plug-in registered.
        target: "tokens" | "codes": what of the teacher is predicted; codes are learned by cross-entropy, which knows
            no `target_norm` and no `mimic_loss`.
        norm_pix_loss: standardise each patch of the pixel target.
        teachers: teacher -> channels of its tokens, or clusters of its codebook; needed unless the objective is "mae",
            which takes none. "distil" without teachers is an encoder alone.
        teacher_weights: teacher -> positive weight, 1 unless given; only their ratios count.
        fusion: "fused" | "each" | "last": how encoder blocks mimic (objective "mr_mae" alone).
        fusion_blocks: 0-based transformer blocks for "fused" and "each"; four evenly spaced ones unless given.
        target_norm: "layernorm" | "channel" | "phi_s" | "none".
        target_scale: the normalised target is multiplied by it; above 0.
        mimic_loss: "smooth_l1" | "mse" | "cosine".
        mimic_head: "linear" | "mlp".
        mimic_weight, pixel_weight: of the two losses, 0 or more.
        summary_weight: of the loss on the teachers' class tokens; 0 leaves it and its heads out.
        summary_source: "class" token of the student, the default where it has one | "mean" of its visible patches.
        standardise_teachers: with several teachers and target_norm "none", bring them to one scale, as the other target
            norms do. With False the teacher of the largest scale dominates.
        drop_teachers: False | True: each sample mimics one teacher, sampled at random | "loss": the one of its highest
            loss, and each other with probability 1/2.
        decoder: "full", MAE's | "cross", see `pipeline.models.cross`.
        predict_share: share of all cells that a step predicts, in (0, 1]; 1 (all masked ones), or 0.25 with "cross",
            unless given. Who calls the model draws the cells: `pipeline.data.masks`.
        gradient_checkpointing: run every block again in the backward pass instead of keeping its activations.
        sparse: False computes ConvViT's first two levels on whole maps: the same numbers, slower.
        grid: (h, w) of the teachers' tokens, for objective "distil" alone; the encoder's own unless given.
        sizes: what differs from the named sizes.

    Raises:
        ConfigError: an unknown name or option, or sizes that don't fit together.
    """
    spec = spec_of(locals(), StudentSizes)
    size = resolve_size(name, **sizes)
    goal = _objective(objective)
    _check_target(target, target_norm, mimic_loss, summary_weight)
    check_choice("target_norm", target_norm, get_args(TargetNorm))
    check_choice("mimic_loss", mimic_loss, get_args(MimicLoss))
    check_choice("mimic_head", mimic_head, get_args(MimicHead))
    if not 0 < target_scale < math.inf:
        raise ConfigError(f"target_scale={target_scale}: give a number above 0")
    if goal.loss is not None:
        _check_own_loss(objective, target_norm, target_scale, mimic_loss, mimic_head)
    check_choice("decoder", decoder, _DECODERS)
    share = _PREDICT_SHARES[decoder] if predict_share is None else predict_share
    if not 0 < share <= 1:
        raise ConfigError(f"predict_share={share}: give a share above 0, up to 1")
    if not isinstance(drop_teachers, bool):
        check_choice("drop_teachers", drop_teachers, ("false", "true", "loss"))
    weights = {"mimic_weight": mimic_weight, "pixel_weight": pixel_weight, "summary_weight": summary_weight}
    for key, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ConfigError(f"{key}={weight}: give 0 or more")
    if summary_weight and not goal.mimics:
        raise ConfigError(f"objective={objective} reads no teacher: set summary_weight=0, or use mr_mae")
    widths, shares = _teachers(objective, goal, teachers or {}, teacher_weights or {})
    blocks = _fusion_blocks(fusion, fusion_blocks, size.depth[-1])
    at_encoder = goal.mimics == "encoder"

    encoder = _encoder(
        name,
        size,
        masked=goal.masks,
        taps=blocks if at_encoder else (),
        gradient_checkpointing=gradient_checkpointing,
        sparse=sparse,
    )
    built_decoder = None
    if goal.decodes:
        built_decoder = _DECODERS[decoder](
            size,
            prefix=encoder.num_prefix_tokens,
            pixels=goal.pixels,
            gradient_checkpointing=gradient_checkpointing,
        )
    balanced = len(widths) > 1
    source = size.decoder_dim if goal.mimics == "decoder" else encoder.dim
    mimics: dict[str, nn.Module]
    if goal.loss is not None:
        mimics = {teacher: goal.loss(dim=source, width=width) for teacher, width in widths.items()}
    else:
        options: dict[str, Any] = {"dim": source, "head": mimic_head}
        options |= {"sources": len(blocks) if at_encoder else 1, "fusion": fusion if at_encoder else "last"}
        if target == "tokens":
            standardise = standardise_teachers and balanced
            options |= {"target_norm": target_norm, "standardise": standardise}
            options |= {"scale": target_scale, "loss": mimic_loss}
        kind = CodeMimic if target == "codes" else Mimic
        mimics = {teacher: kind(teacher, width=width, **options) for teacher, width in widths.items()}
    summaries = {
        teacher: SummaryHead(encoder.dim, width, balanced) for teacher, width in widths.items() if summary_weight
    }
    return Student(
        encoder,
        built_decoder,
        mimics,
        summaries,
        predict_share=share if goal.decodes else 1.0,
        objective=objective,
        norm_pix_loss=norm_pix_loss,
        mimic_weight=mimic_weight,
        pixel_weight=pixel_weight,
        summary_weight=summary_weight,
        summary_source=_summary_source(name, encoder, summary_source),
        teacher_shares=shares,
        drop_teachers=drop_teachers,
        grid=None if grid is None else (grid[0], grid[1]),
        spec=spec,
    )


def build_classifier(
    name: str,
    num_classes: int,
    *,
    drop_path: float = 0.0,
    pool: str = "mean",
    gradient_checkpointing: bool = False,
    **sizes: Unpack[EncoderSizes],
) -> Classifier:
    """Build a classifier on the encoder of the student of that name.

    Args:
        num_classes: 1 or more.
        drop_path: stochastic depth of the last block, in [0, 1); it grows linearly from 0 at the first.
        pool: "mean" of the patch tokens | "cls", which ConvViT doesn't have.
        sizes: what differs from the named sizes.

    Raises:
        ConfigError: an unknown name or option, or sizes that don't fit together.
    """
    spec = spec_of(locals(), EncoderSizes)
    size = resolve_size(name, **sizes)
    check_choice("pool", pool, ("mean", "cls"))
    if num_classes < 1:
        raise ConfigError(f"num_classes={num_classes}: give 1 or more")
    if not 0 <= drop_path < 1:
        raise ConfigError(f"drop_path={drop_path}: give a rate from 0 to below 1")
    encoder = _encoder(
        name,
        size,
        masked=False,
        drop_path=drop_path,
        final_norm=pool == "cls",
        gradient_checkpointing=gradient_checkpointing,
    )
    if pool == "cls" and encoder.attention_query != "cls":
        raise ConfigError(f"{name} has no CLS token: use pool=mean")
    return Classifier(encoder, num_classes, pool=pool, spec=spec)


def _encoder(name: str, size: Size, *, masked: bool, sparse: bool = True, **options: Any) -> Encoder:
    if not is_timm(name):
        return ConvViT(size, sparse=sparse, **options) if size.is_conv else ViT(size, **options)
    named = timm_model(name)
    if named.maskable:
        return TimmViT(named, size, **options)
    if masked:
        raise ConfigError(
            f"student.name={name} ({named.kind}) is no plain ViT, and its patches can't be masked: set "
            "mimic.objective=distil, which shows it whole views, or choose a vit_*, deit_* or eva_* model"
        )
    if size_changes(named, size):
        raise ConfigError(f"student.name={name} has sizes of its own: leave out dim, depth, num_heads and patch_size")
    for_features = {key: value for key, value in options.items() if key in ("drop_path", "gradient_checkpointing")}
    return FeatureMap(named, size, **for_features)


def _summary_source(name: str, encoder: Encoder, source: SummarySource | None) -> SummarySource:
    """Which vector of the student predicts summaries: its class token where it has one."""
    has_class = encoder.attention_query == "cls"
    if source is None:
        return "class" if has_class else "mean"
    check_choice("summary_source", source, get_args(SummarySource))
    if source == "class" and not has_class:
        raise ConfigError(f"{name} has no CLS token: use summary_source=mean")
    return source


def _objective(name: str) -> Objective:
    try:
        return OBJECTIVES[check_objective(name)]
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_own_loss(objective: str, target_norm: str, target_scale: float, mimic_loss: str, mimic_head: str) -> None:
    """A plugged objective has a loss of its own, which the keys of ours don't reach."""
    given = target_norm != "layernorm" or target_scale not in (TARGET_SCALE, 1.0) or mimic_head != "linear"
    if given or mimic_loss not in _DEFAULT_LOSSES:
        raise ConfigError(
            f"objective={objective} has a loss of its own: leave target_norm, target_scale, mimic_loss and mimic_head "
            "out"
        )


def _check_target(target: str, target_norm: str, mimic_loss: str, summary_weight: float) -> None:
    """What is predicted of a teacher; codes leave no other choice."""
    check_choice("target", target, get_args(MimicTarget))
    if target == "codes" and (target_norm != "layernorm" or mimic_loss not in _DEFAULT_LOSSES):
        raise ConfigError("target=codes is learned by cross-entropy: leave target_norm and mimic_loss out")
    if target == "codes" and summary_weight:
        raise ConfigError("target=codes comes without class tokens: set summary_weight=0, or use target=tokens")


def _teachers(
    objective: str, goal: Objective, widths: Mapping[str, int], weights: Mapping[str, float]
) -> tuple[dict[str, int], dict[str, float]]:
    """Checked widths, and each teacher's share of the mimic loss, adding up to 1."""
    if goal.mimics not in ("", "map") and not widths:  # on whole maps it is an encoder alone then
        raise ConfigError(f"objective={objective} mimics, but no teacher is given: name one, or use objective=mae")
    if widths and not goal.mimics:
        raise ConfigError(f"objective={objective} reads no teacher: leave {', '.join(widths)} out, or use mr_mae")
    for teacher in weights:
        check_choice("teacher_weights", teacher, widths)
    raw = {teacher: weights.get(teacher, 1.0) for teacher in widths}
    for teacher, number in (*widths.items(), *raw.items()):
        if not 0 < number < math.inf:
            raise ConfigError(
                f"teacher '{teacher}': {number} is no positive width or weight; to leave it out, remove it"
            )
    if len({module_name(teacher) for teacher in widths}) < len(widths):
        raise ConfigError(f"teachers {', '.join(widths)}: two names differ only in '.' and '_'; rename one")
    return dict(widths), {teacher: weight / sum(raw.values()) for teacher, weight in raw.items()}


def _fusion_blocks(fusion: str, blocks: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """The encoder blocks that mimic, ascending."""
    check_choice("fusion", fusion, get_args(Fusion))
    if fusion == "last":
        if blocks is not None:
            raise ConfigError(f"fusion=last takes no fusion_blocks: leave {list(blocks)} out, or use fused or each")
        return (depth - 1,)
    if blocks is None:
        return tuple(sorted({(quarter * depth + 3) // 4 - 1 for quarter in (1, 2, 3, 4)}))
    chosen = tuple(sorted(set(blocks)))
    if len(chosen) < len(blocks) or not chosen or not 0 <= chosen[0] <= chosen[-1] < depth:
        raise ConfigError(f"fusion_blocks={list(blocks)}: name different blocks from 0 to {depth - 1}")
    return chosen
