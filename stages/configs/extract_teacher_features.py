"""The keys of `extract-teacher-features`."""

import math
import re
from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from pipeline.config import Config, LocationField, PathField, Precision
from pipeline.configs.cache import AttentionKind, QuantiserName, StoreName
from pipeline.configs.data import DataConfig, ViewConfig
from pipeline.configs.teachers import TeacherConfig


class CacheOutput(Config):
    """Where the features go, and in what form."""

    main_key: ClassVar[str] = "path"

    # The cache's folder, or with several teachers the folder of their caches; or its URL: s3:// or gs://
    path: LocationField
    local: PathField | None = None  # where shards lie until they are at such a URL; null: ~/.cache/mrmae
    store: StoreName = "zarr"  # zarr: features beside the images; webdataset: tars that hold the images, too
    quantiser: QuantiserName = "int8"  # how tokens are stored; int8 takes a byte a channel
    samples_per_shard: int = Field(1024, ge=1, le=65536)  # one file a shard and view: 154 MB at 196x768
    attention: AttentionKind = "mean"  # heads: one row each, for people who want to look; none: mask.focus=random alone
    summary: bool = False  # also the teacher's class token: one row more a view, which mimic.summary_weight needs
    calibration: int = Field(256, ge=1)  # samples that the channel statistics are measured on; more for a codebook
    clusters: int = Field(4096, ge=2, le=65535)  # of the codebook, with quantiser=codes
    # Loss of a shard's worst channel; null: 0.02 for int4, no bound for codes, else 0.01
    max_nmse: float | None = Field(None, gt=0)
    # Of its LayerNormed tokens; null: 0.99 for int4, no bound for codes, else 0.999
    min_cosine: float | None = Field(None, gt=0, le=1)

    @model_validator(mode="after")
    def _codes_are_of_patches(self) -> "CacheOutput":
        if self.summary and self.quantiser == "codes":
            raise ValueError("quantiser=codes keeps no class token: set summary=false, or use int8")
        return self

    @property
    def bounds(self) -> dict[str, float]:
        """What `FidelityFigures.check` takes."""
        bounds = {"int4": (2e-2, 0.99), "codes": (math.inf, -1.0)}
        max_nmse, min_cosine = bounds.get(self.quantiser, (1e-2, 0.999))
        return {
            "max_nmse": max_nmse if self.max_nmse is None else self.max_nmse,
            "min_cosine": min_cosine if self.min_cosine is None else self.min_cosine,
        }


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

    def caches(self) -> dict[Path | str, TeacherConfig]:
        """Where each teacher's cache goes: a folder, or (text) a URL."""
        path = self.cache.path
        if self.teacher is not None:
            return {path: self.teacher}
        if isinstance(path, Path):
            return {path / name: teacher for name, teacher in self.teachers.items()}
        return {f"{path}/{name}": teacher for name, teacher in self.teachers.items()}
