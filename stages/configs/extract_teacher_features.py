"""The keys of `extract-teacher-features`."""

import re
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config import Config, PathField, Precision
from pipeline.configs.cache import QuantiserName, StoreName
from pipeline.configs.data import DataConfig, ViewConfig
from pipeline.configs.teachers import TeacherConfig


class CacheOutput(Config):
    """Where the features go, and in what form."""

    main_key: ClassVar[str] = "path"

    path: PathField  # the cache's folder, or with several teachers the folder of their caches
    store: StoreName = "zarr"  # zarr: features beside the images; webdataset: tars that hold the images, too
    quantiser: QuantiserName = "int8"  # how tokens are stored; int8 takes a byte a channel
    samples_per_shard: int = Field(1024, ge=1, le=65536)  # one file a shard and view: 154 MB at 196x768
    attention: Literal["mean", "heads"] = "mean"  # heads: one row each, for people who want to look
    calibration: int = Field(256, ge=1)  # samples that the channel statistics are measured on
    max_nmse: float = Field(1e-2, gt=0)  # what a shard may lose in its worst channel; int8 loses about 5e-5
    min_cosine: float = Field(0.999, gt=0, le=1)  # of its LayerNormed tokens, on average; int8 keeps about 0.99997


class ExtractConfig(Config):
    """Everything `extract-teacher-features` takes."""

    data: DataConfig
    teacher: TeacherConfig | None = None
    teachers: dict[str, TeacherConfig] = Field(default_factory=dict)  # several in one pass: teacher NAME → path/NAME
    views: ViewConfig = ViewConfig()
    cache: CacheOutput
    batch_size: int = Field(64, ge=1)  # views per forward pass of the teacher
    precision: Precision = "auto"  # of the teacher's forward pass; auto: bf16 on CUDA, fp32 on a CPU
    max_tombstones: float = Field(0.01, ge=0, le=1)  # share of unreadable images above which the run fails

    @model_validator(mode="after")
    def _one_way_to_name_teachers(self) -> "ExtractConfig":
        if (self.teacher is None) == (not self.teachers):
            raise ValueError("give teacher.spec=..., or teachers.NAME.spec=... for several in one pass")
        for name in self.teachers:
            if not re.fullmatch(r"[\w-][\w.-]*", name):
                raise ValueError(f"teachers.{name}: a name becomes a folder, so use letters, digits, '.', '_' and '-'")
        return self

    def caches(self) -> dict[Path, TeacherConfig]:
        """Where each teacher's cache goes."""
        if self.teacher is not None:
            return {self.cache.path: self.teacher}
        return {self.cache.path / name: teacher for name, teacher in self.teachers.items()}
