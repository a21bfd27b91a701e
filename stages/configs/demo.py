"""The keys of `demo`."""

from pathlib import Path

from pydantic import Field

from pipeline.config import Config, PathField


class DemoConfig(Config):
    """Everything `demo` takes."""

    output: PathField = Path("runs/demo")
    seed: int = Field(0, ge=0)
    max_steps: int = Field(400, ge=1)  # of each student's pre-training
    teacher_steps: int = Field(300, ge=1)
    finetune_steps: int = Field(60, ge=1)
