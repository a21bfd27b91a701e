"""Estimate what a cache costs and what it saves.

Gives bytes, GPU-hours, the read rate of training, and the most that a cache can save, before a disk is filled:

    mrmae plan samples=1281167 views=1 teacher=clip_vitb16

Reads nothing but its keys (samples, views, teacher, student, gpu, gpus, store, ...). Writes nothing. Costs no time.

Bytes come from the format. Hours come from rates: what the card can do by its data sheet, times the share of it that
was measured or is assumed, over the operations of teacher and student. Give your own rates where you know them. Each
result says where its rate is from, what limits it, and which keys move that limit. Hours are a lower bound: cropping,
encoding JPEGs and starting are not counted, the disk only with disk_rate. The ceiling of the saving comes from counted
multiplications: a step with a live teacher costs the student's forward and backward plus the teacher's forward; with a
cache, the student alone. `step_over_mae` is that step over one with MAE's decoder (decoder=full). With batch_size, the
memory that pre-training takes on a GPU follows, from the tensors of a step; that takes some seconds. Two plans:
docs/scaling.md.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.assembly.memory import step_memory
from pipeline.cache.budget import estimate_bytes, readable
from pipeline.configs.models import DecoderKind
from pipeline.data.masks import predicted_count, visible_count
from pipeline.errors import ConfigError, TeacherError
from pipeline.flop_counting import flop_counter
from pipeline.models import build_student
from pipeline.teachers import NO_ATTENTION, describe_teacher
from pipeline.training.flops import peak_tflops
from stages.configs.plan import PlanConfig

# Shares of a card's dense bf16 rate. Training: 5,294 images/s of 58 GFLOP on one H200, ViT-B, batch 512, compiled
# (docs/benchmarks.md). Extraction: assumed between the 8% of a whole command of 5 s, its start included, and the 36% of
# a compiled teacher in a training step, both on that H200.
_TRAINING_SHARE, _EXTRACTION_SHARE = 0.31, 0.16

# What moves each limit, by stage.
_EXTRACTION_KEYS = {
    "teacher": "gpus, gpu, views, teacher (extraction_rate)",
    "decoding": "cores, gpus (photo_rate)",
    "disk": "disk_rate, quantiser, store, views, teacher",
}
_TRAINING_KEYS = {
    "step": "gpus, gpu, student, decoder, epochs (training_rate)",
    "decoding": "store=webdataset, cores, gpus (photo_rate, stored_rate)",
    "disk": "disk_rate, quantiser, store, teacher",
}


def run(config: PlanConfig) -> dict[str, Any]:
    """Answer in one JSON-able dict: bytes, hours and what limits them, where each rate is from, the saving's ceiling.

    Raises:
        ConfigError: a card that isn't known. TeacherError: a teacher that isn't known.
    """
    teacher = describe_teacher(config.teacher)
    attention = config.attention if teacher.has_attention else "none"
    if config.summary and not teacher.has_summary:
        raise TeacherError(f"teacher '{config.teacher}' has no class token to keep: set summary=false")
    if config.summary and config.quantiser == "codes":
        raise ConfigError("quantiser=codes keeps no class token: set summary=false")
    tokens = teacher.grid[0] * teacher.grid[1]
    attended = tokens * {"mean": 1, "heads": teacher.dim // 64, "none": 0}[attention]
    view = estimate_bytes(tokens + config.summary, teacher.dim, config.store, config.quantiser, attended)
    size = config.samples * config.views * view
    step = step_gmac(config.student, config.mask_ratio, config.decoder, config.predict_share)
    ceiling = (step + teacher.gmacs) / step
    extraction_rate = config.extraction_rate or _rate_of_card(config, _EXTRACTION_SHARE, teacher.gmacs)
    training_rate = config.training_rate or config.gpus * _rate_of_card(config, _TRAINING_SHARE, step)
    cores = config.gpus * config.cores
    disk = config.disk_rate / view if config.disk_rate else float("inf")
    extraction, extraction_limit = _slowest(
        teacher=config.gpus * extraction_rate / config.views,
        decoding=cores * config.photo_rate,
        disk=disk / config.views,
    )
    decoding = cores * (config.stored_rate if config.store == "webdataset" else config.photo_rate)
    training, training_limit = _slowest(step=training_rate, decoding=decoding, disk=disk)
    live, _ = _slowest(step=training_rate / ceiling, decoding=cores * config.photo_rate)
    shown = config.samples * config.epochs
    return {
        "bytes": size,
        "size": readable(size),
        "bytes_per_view": view,
        "extraction_gpu_hours": config.samples * config.views / extraction_rate / 3600,
        "extraction_hours": config.samples / extraction / 3600,
        "extraction_limit": extraction_limit,
        "extraction_moved_by": _EXTRACTION_KEYS[extraction_limit],
        "write_rate": f"{readable(view * config.views * extraction)}/s",
        "training_hours": shown / training / 3600,
        "training_limit": training_limit,
        "training_moved_by": _TRAINING_KEYS[training_limit],
        "training_hours_live_teacher": shown / live / 3600,
        "read_bytes_per_second": view * training,
        "read_rate": f"{readable(view * training)}/s",
        "teacher_gmac": teacher.gmacs,
        "student_step_gmac": step,
        "step_over_mae": step / step_gmac(config.student, config.mask_ratio),
        "focus": "by attention" if teacher.has_attention else NO_ATTENTION,
        "saving_ceiling": ceiling,
        "epochs_to_pay_back": config.views,  # an epoch with a live teacher runs it once an image
        "extraction_rate": extraction_rate,
        "training_rate": training_rate,
        **_sources(config),
        **(_memory(config, config.batch_size, teacher.dim) if config.batch_size else {}),
    }


def _memory(config: PlanConfig, batch_size: int, teacher_dim: int) -> dict[str, Any]:
    """What pre-training with one cached teacher takes on each GPU."""
    images, left = divmod(batch_size, config.gpus)
    if left:
        raise ConfigError(f"batch_size={batch_size} is no multiple of gpus={config.gpus}")
    with FakeTensorMode():
        student = build_student(
            config.student,
            teachers={"teacher": teacher_dim},
            decoder=config.decoder,
            predict_share=config.predict_share,
            gradient_checkpointing=config.gradient_checkpointing,
        )
        bf16, fsdp = config.precision == "bf16", config.sharding == "fsdp"
        memory = step_memory(student, images, config.mask_ratio, bf16, config.gpus, fsdp)
    parts = {name: readable(size) for name, size in memory._asdict().items() if name != "peak"}
    return {
        "gpu_images": images,
        "gpu_memory_bytes": memory.peak,
        "gpu_memory": readable(memory.peak),
        **{f"gpu_{name}": size for name, size in parts.items()},
        "gpu_memory_from": "computed from the tensors of a step without compile; CUDA itself takes about 0.5 GB beside",
    }


def _rate_of_card(config: PlanConfig, share: float, gmac: float) -> float:
    """Images a second of one card that does `share` of its peak, at `gmac` billions of multiply-accumulates each."""
    return share * _peak(config) * 1e12 / (2e9 * gmac)


def _peak(config: PlanConfig) -> float:
    tflops = config.peak_tflops or peak_tflops(config.gpu)
    if tflops is None:
        raise ConfigError(
            f"gpu={config.gpu} isn't known here: give peak_tflops=..., its dense bf16 TFLOP/s by the data sheet, or "
            "another name, such as H100, H200, A100, L40S or RTX 4090"
        )
    return tflops


def _slowest(**rates: float) -> tuple[float, str]:
    """Images a second of the slowest part, and its name."""
    name = min(rates, key=lambda part: rates[part])
    return rates[name], name


def _sources(config: PlanConfig) -> Mapping[str, str]:
    """Where each rate is from."""
    given = "given"

    def of_card(share: float, how: str) -> str:
        peak = "given" if config.peak_tflops else f"{config.gpu}, data sheet"
        return f"{share:.0%} of {_peak(config):g} dense bf16 TFLOP/s ({peak}); {how}"

    extraction = of_card(_EXTRACTION_SHARE, "assumed, measure yours by `mrmae benchmark extract`")
    training = of_card(
        _TRAINING_SHARE,
        "measured on one H200 (ViT-B, batch 512, compile=true), assumed for other students and cards",
    )
    decoding = "decoding on one x86-64 core, measured (docs/benchmarks.md)"
    return {
        "extraction_rate_from": given if config.extraction_rate else extraction,
        "training_rate_from": given if config.training_rate else training,
        "photo_rate_from": given if "photo_rate" in config.model_fields_set else decoding,
        "stored_rate_from": given if "stored_rate" in config.model_fields_set else decoding,
        "disk_rate_from": given if config.disk_rate else "not counted: give disk_rate=... bytes a second, such as 2GB",
    }


@functools.cache
def step_gmac(
    student: str, mask_ratio: float, decoder: DecoderKind = "full", predict_share: float | None = None
) -> float:
    """Billions of multiply-accumulates of one image's training step: counted forward, times three for the backward."""
    with torch.device("meta"):  # shapes alone: nothing is computed
        model = build_student(student, objective="mae", decoder=decoder, predict_share=predict_share)
        length = model.grid[0] * model.grid[1]
        keep = visible_count(length, mask_ratio)
        count = predicted_count(length, keep, model.predict_share)
        images = torch.empty(1, 3, *model.encoder.image_size)
        ids_keep = torch.empty(1, keep, dtype=torch.int64)
        ids_predict = None if count is None else torch.empty(1, count, dtype=torch.int64)
        with flop_counter() as counter:
            model(images, ids_keep, None, ids_predict)
    flops: int = counter.get_total_flops()
    return 3 * flops / 2 / 1e9
