"""`mrmae plan`: what a teacher cache will cost and what it can save, before a disk is filled by surprise.

Bytes come from the format, hours from a given rate, the ceiling of the saving from counted multiplications: a step
with a live teacher costs student forward and backward plus the teacher's forward; with a cache, the student alone.
"""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from pipeline.cache.budget import estimate_bytes, readable
from pipeline.config import Config
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Transformer:
    """The shape of a plain ViT at its input size: what its cost depends on."""

    dim: int
    depth: int
    patch: int
    grid: int = 14  # tokens a side


TEACHERS = {
    "dino_vits16": Transformer(384, 12, 16),
    "dino_vitb16": Transformer(768, 12, 16),
    "clip_vitb16": Transformer(768, 12, 16),
    "clip_vitl14": Transformer(1024, 24, 14),
    "dinov2_vits14": Transformer(384, 12, 14),
    "dinov2_vitb14": Transformer(768, 12, 14),
}
STUDENTS = {  # encoder, decoder
    "mrmae_vit_tiny_patch16": (Transformer(192, 12, 16), Transformer(192, 4, 16)),
    "mrmae_vit_small_patch16": (Transformer(384, 12, 16), Transformer(256, 4, 16)),
    "mrmae_vit_base_patch16": (Transformer(768, 12, 16), Transformer(512, 8, 16)),
    "mrmae_vit_large_patch16": (Transformer(1024, 24, 16), Transformer(512, 8, 16)),
}


class PlanConfig(Config):
    """What is planned; every rate is images a second."""

    samples: int = Field(default=1_281_167, ge=1)  # images of the dataset; ImageNet-1k by default
    views: int = Field(default=1, ge=1)  # of each image
    teacher: str = "clip_vitb16"  # one of TEACHERS
    student: str = "mrmae_vit_base_patch16"  # one of STUDENTS
    store: Literal["zarr", "webdataset"] = "zarr"
    quantiser: Literal["int8", "float16", "float32"] = "int8"
    attention: Literal["mean", "heads", "none"] = "mean"
    compressed: bool = False  # float tokens in the zarr store
    extraction_rate: float = Field(default=1000.0, gt=0)  # of one GPU; measure yours with `extract-teacher-features`
    training_rate: float = Field(default=2000.0, gt=0)  # of all GPUs together
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)


def run(config: PlanConfig) -> dict[str, Any]:
    """Answer in one JSON-able dict: bytes, hours, bytes a second, and the ceiling of the saving as a factor."""
    teacher, (encoder, decoder) = _known(TEACHERS, config.teacher), _known(STUDENTS, config.student)
    tokens = teacher.grid**2
    size = estimate_bytes(
        samples=config.samples,
        views=config.views,
        tokens=tokens,
        dim=teacher.dim,
        store=config.store,
        quantiser=config.quantiser,
        attention=config.attention,
        heads=teacher.dim // 64,
        compressed=config.compressed,
    )
    visible = round(tokens * (1 - config.mask_ratio))
    student_macs = 3 * (macs(encoder, visible + 1) + macs(decoder, tokens + 1))  # backward is two forwards
    teacher_macs = macs(teacher, tokens + 1)
    view = size / (config.samples * config.views)
    return {
        "bytes": size,
        "size": readable(size),
        "bytes_per_view": round(view),
        "extraction_gpu_hours": config.samples * config.views / config.extraction_rate / 3600,
        "read_bytes_per_second": view * config.training_rate,
        "read_rate": f"{readable(view * config.training_rate)}/s",
        "teacher_gmac": teacher_macs / 1e9,
        "student_step_gmac": student_macs / 1e9,
        "saving_ceiling": (student_macs + teacher_macs) / student_macs,
        "epochs_to_pay_back": config.views,  # an epoch with a live teacher runs it once an image
    }


def macs(model: Transformer, tokens: int) -> float:
    """Multiplications of one forward over `tokens` tokens: 12·D² a token in linear layers, 2·T·D in attention."""
    D, T = model.dim, tokens
    patches = (T - 1) * D * 3 * model.patch**2
    return float(model.depth * (12 * D * D * T + 2 * T * T * D) + patches)


def _known(table: dict[str, Any], name: str) -> Any:
    if name not in table:
        raise ConfigError(f"'{name}' is not planned for; choose one of {', '.join(table)}")
    return table[name]
