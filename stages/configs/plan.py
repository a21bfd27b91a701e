"""The keys of `plan`."""

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from pipeline.config import Amount, Config
from pipeline.configs.cache import AttentionKind, QuantiserName, StoreName
from pipeline.configs.models import DecoderKind
from pipeline.configs.training import Sharding


def _billions(value: object) -> object:
    """2B of images are two billions; as an amount of bytes, they would be two."""
    return re.sub(r"[bB]$", "G", value) if isinstance(value, str) else value


class PlanConfig(Config):
    """What is planned; every rate is a number a second."""

    samples: Annotated[Amount, BeforeValidator(_billions)] = Field(default=1_281_167, ge=1)  # images, also as 1.28M
    views: int = Field(default=1, ge=1)  # of each image
    teacher: str = "clip_vitb16"  # a name that `mrmae teachers` lists, timm:NAME or open_clip:ARCH:TAG
    student: str = "mrmae_vit_base_patch16"  # a name as in student.name
    decoder: DecoderKind = "full"  # as student.decoder of pre-training
    predict_share: float | None = Field(default=None, gt=0, le=1)  # as student.predict_share of pre-training
    store: StoreName = "zarr"  # of the cache
    quantiser: QuantiserName = "int8"  # of the cache
    attention: AttentionKind = "mean"  # what the cache keeps of it
    summary: bool = False  # as cache.summary of extraction
    epochs: int = Field(default=400, ge=1)  # of training
    gpu: str = "H100"  # the card, such as H200, A100, L40S or RTX 4090
    peak_tflops: float | None = Field(default=None, gt=0)  # dense bf16 TFLOP/s of the card; default: by its name
    gpus: int = Field(default=8, ge=1)  # of training and extraction
    cores: int = Field(default=16, ge=1)  # CPU cores a GPU, for decoding
    extraction_rate: float | None = Field(default=None, gt=0)  # views, of one GPU; default: by card and teacher
    training_rate: float | None = Field(default=None, gt=0)  # images, of all GPUs; default: by cards and student
    photo_rate: float = Field(default=223.0, gt=0)  # photos that a core decodes; `mrmae benchmark decode`
    stored_rate: float = Field(default=960.0, gt=0)  # stored 224-px photos that a core decodes and crops
    disk_rate: Amount | None = Field(default=None, gt=0)  # bytes of disk or network
    # Of pre-training, over all GPUs. Given, the memory of a GPU is told, with this and the next three keys
    batch_size: int | None = Field(default=None, ge=1)
    precision: Literal["bf16", "fp32"] = "bf16"  # as precision of pre-training
    gradient_checkpointing: bool = False  # as student.gradient_checkpointing of pre-training
    sharding: Sharding = "ddp"  # as sharding of pre-training
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)  # share of the patches that are hidden
