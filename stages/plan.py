"""Estimate what a cache costs and what it saves.

Gives bytes, GPU-hours, the read rate of training, and the most that a cache can save, before a disk is filled:

    mrmae plan samples=1281167 views=1 teacher=clip_vitb16

Reads nothing but its keys (samples, views, teacher, store, quantiser, ...). Writes nothing. Costs no time.

Bytes come from the format. Hours come from given rates, and from the slower side, accelerators or decoding. They are a
lower bound: writing to the disk, cropping and encoding JPEGs are not counted. The ceiling of the saving comes from
counted multiplications: a step with a live teacher costs the student's forward and backward plus the teacher's forward;
with a cache, the student alone. `step_over_mae` is that step over one with MAE's decoder (decoder=full). Two plans:
docs/scaling.md.
"""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.cache.budget import estimate_bytes, readable
from pipeline.configs.models import DecoderKind
from pipeline.data.masks import predicted_count, visible_count
from pipeline.errors import TeacherError
from pipeline.models import build_student
from pipeline.teachers import NO_ATTENTION, describe_teacher
from stages.configs.plan import PlanConfig


def run(config: PlanConfig) -> dict[str, Any]:
    """Answer in one JSON-able dict: bytes, hours and what limits them, bytes a second, the factor that can be saved."""
    teacher = describe_teacher(config.teacher)
    attention = config.attention if teacher.has_attention else "none"
    if config.summary and not teacher.has_summary:
        raise TeacherError(f"teacher '{config.teacher}' has no class token to keep: set summary=false")
    tokens = teacher.grid[0] * teacher.grid[1]
    attended = tokens * {"mean": 1, "heads": teacher.dim // 64, "none": 0}[attention]
    view = estimate_bytes(tokens + config.summary, teacher.dim, config.store, config.quantiser, attended)
    size = config.samples * config.views * view
    step = step_gmac(config.student, config.mask_ratio, config.decoder, config.predict_share)
    cores = config.gpus * config.cores
    decoding = cores * (config.stored_rate if config.store == "webdataset" else config.photo_rate)
    extraction = min(config.gpus * config.extraction_rate / config.views, cores * config.photo_rate)
    training = min(config.training_rate, decoding)
    return {
        "bytes": size,
        "size": readable(size),
        "bytes_per_view": view,
        "extraction_gpu_hours": config.samples * config.views / config.extraction_rate / 3600,
        "extraction_hours": config.samples / extraction / 3600,
        "extraction_limit": "decoding" if extraction == cores * config.photo_rate else "teacher",
        "training_hours": config.samples * config.epochs / training / 3600,
        "training_limit": "decoding" if training == decoding else "step",
        "read_bytes_per_second": view * training,
        "read_rate": f"{readable(view * training)}/s",
        "teacher_gmac": teacher.gmacs,
        "student_step_gmac": step,
        "step_over_mae": step / step_gmac(config.student, config.mask_ratio),
        "focus": "by attention" if teacher.has_attention else NO_ATTENTION,
        "saving_ceiling": (step + teacher.gmacs) / step,
        "epochs_to_pay_back": config.views,  # an epoch with a live teacher runs it once an image
    }


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
        with FlopCounterMode(display=False) as counter:
            model(images, ids_keep, None, ids_predict)
    flops: int = counter.get_total_flops()
    return 3 * flops / 2 / 1e9
