"""The keys of `ablate`."""

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config import Config, PathField

Measure = Literal["knn", "linear-probe", "finetune"]


class VariantConfig(Config):
    """What one row of the table changes."""

    group: str = ""  # rows of one group are compared with each other
    cache: str | None = None  # a name in `caches`; null: none, for an untrained student or plain MAE
    pretrain: list[str] | None = None  # keys for `pretrain`; null: no pre-training
    student: list[str] = Field(default_factory=list)  # keys for an untrained student, in place of init


class AblateConfig(Config):
    """Everything `ablate` takes."""

    output: PathField  # folder of the runs and the tables
    seeds: list[int] = Field(default=[0, 1], min_length=1)  # each variant is run with each of them
    measures: list[Measure] = Field(
        default=["knn", "linear-probe", "finetune"], min_length=1
    )  # commands that measure each run
    # name of a further labelled data set → keys for `knn` and `linear-probe` there (data.path, val.path)
    transfer: dict[str, list[str]] = Field(default_factory=dict)
    caches: dict[str, list[str]]  # name → keys for `extract-teacher-features`
    variants: dict[str, VariantConfig] = Field(min_length=1)
    jobs: int = Field(1, ge=1, le=1024)  # variants that run at once, on the GPUs in turn and an even share of the cores
    minutes: float | None = Field(None, gt=0)  # for all runs together, at equal steps; null: as long as `pretrain` says
    groups: list[str] = Field(default_factory=list)  # run the variants of these groups alone; default: all

    @property
    def chosen(self) -> dict[str, VariantConfig]:
        """The variants that are run."""
        return {
            name: variant for name, variant in self.variants.items() if not self.groups or variant.group in self.groups
        }

    @property
    def columns(self) -> list[str]:
        """Of the table: the measures, and those of further data sets."""
        further = [f"{measure}, {name}" for name in self.transfer for measure in self.measures if measure != "finetune"]
        return [*self.measures, *further]

    @model_validator(mode="after")
    def _known_caches(self) -> "AblateConfig":
        for name, variant in self.variants.items():
            if variant.cache is not None and variant.cache not in self.caches:
                raise ValueError(f"variants.{name}.cache={variant.cache}: caches has {', '.join(self.caches)}")
        groups = {variant.group for variant in self.variants.values()}
        if strange := set(self.groups) - groups:
            raise ValueError(f"groups={sorted(strange)}: the variants have {', '.join(sorted(groups))}")
        if self.minutes is not None and all(variant.pretrain is None for variant in self.chosen.values()):
            raise ValueError("minutes bounds pre-trainings, and no variant has one: leave it out")
        return self
