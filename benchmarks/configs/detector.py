"""The keys of `benchmark detector`."""

from typing import Literal

from pydantic import Field

from pipeline.config import Config
from pipeline.configs.detection import DetectorConfig


class BenchmarkDetectorConfig(Config):
    """What to time, and how often."""

    students: list[str] = Field(default=["mrmae_vit_base_patch16", "mrmae_convvit_base_patch16"], min_length=1)
    image_size: int = Field(default=1024, ge=32)
    batch_size: int = Field(default=1, gt=0)
    objects: int = Field(default=7, gt=0)  # in an image
    detector: DetectorConfig = DetectorConfig()
    gradient_checkpointing: bool = False
    rounds: int = Field(default=3, ge=0)  # after one that warms up; 0 counts multiply-adds and times nothing
    device: Literal["auto", "cpu", "cuda"] = "auto"  # bf16 on CUDA, fp32 on a CPU
    threads: int | None = Field(default=None, gt=0)  # CPU threads; torch's choice unless given
    seed: int = 0
