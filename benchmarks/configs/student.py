"""The keys of `benchmark student`."""

from typing import Literal

from pydantic import Field

from pipeline.config import Config


class BenchmarkStudentConfig(Config):
    """What to time, and how often."""

    students: list[str] = Field(default=["mrmae_convvit_base_patch16"], min_length=1)
    batch_size: int = Field(default=8, gt=0)
    image_size: int = Field(default=224, gt=0)
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    teacher_dim: int = Field(default=768, gt=0)  # channels of the mimicked tokens
    rounds: int = Field(default=5, gt=0)  # after one that warms up
    device: Literal["auto", "cpu", "cuda"] = "auto"  # bf16 on CUDA, fp32 on a CPU
    threads: int | None = Field(default=None, gt=0)  # CPU threads; torch's choice unless given
    compile: bool = False  # time torch.compile as well
    peak_memory: bool = True  # on a CPU each path then runs once more, in a process of its own
    seed: int = 0
