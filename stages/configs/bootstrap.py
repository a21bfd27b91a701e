"""The keys of `bootstrap`."""

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config import Config, PathField

Measure = Literal["knn", "linear-probe"]


class BootstrapConfig(Config):
    """Everything `bootstrap` takes."""

    output: PathField  # folder of all stages, table.md and curve.png
    stages: int = Field(2, ge=1, le=100)  # pre-trainings; each but the first learns from the student before it
    start: Literal["teacher", "pixels"] = "teacher"  # what stage 1 learns from: the section's teacher, or pixels alone
    init: Literal["fresh", "previous"] = "fresh"  # later students start: drawn anew, or with the weights before them
    first_teacher: float = Field(0.0, ge=0, lt=1)  # share of the mimic loss that the first teacher keeps later on
    seeds: list[int] = Field(default=[0], min_length=1)  # all stages are run for each of them
    measures: list[Measure] = Field(default=["knn"], min_length=1)  # of each stage's student
    pretrain: list[str] = Field(default_factory=list)  # keys for the pre-trainings after the first

    @model_validator(mode="after")
    def _has_a_first_teacher(self) -> "BootstrapConfig":
        if self.first_teacher and self.start == "pixels":
            raise ValueError("first_teacher needs start=teacher: with start=pixels there is none")
        return self
