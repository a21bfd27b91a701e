"""The keys of `demo`."""

from pathlib import Path

from pydantic import Field

from pipeline.config import Config, PathField


class DemoConfig(Config):
    """Everything `demo` takes."""

    output: PathField = Path("runs/demo")  # folder of everything that it makes
    seed: int = Field(0, ge=0)  # of everything that is drawn
    max_steps: int = Field(400, ge=1)  # of each student's pre-training
    teacher_steps: int = Field(300, ge=1)  # of the teacher's training
    finetune_steps: int = Field(60, ge=1)  # of each fine-tuning
