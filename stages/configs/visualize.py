"""The keys of `visualize`."""

from typing import Annotated

from pydantic import Field, Strict, model_validator

from pipeline.config import Config, PathField
from pipeline.configs.cache import CacheInput
from pipeline.configs.data import DataConfig, Focus
from pipeline.configs.models import StudentConfig
from pipeline.configs.teachers import TeacherConfig


class VisualizeConfig(Config):
    """Everything `visualize` takes."""

    init: PathField  # a run, a checkpoint or a public weights file
    student: StudentConfig | None = None  # for a lone weights file
    images: Annotated[tuple[PathField, ...], Strict(False)] = ()  # image files
    data: DataConfig | None = None  # or images by data.path, as in extraction
    samples: Annotated[tuple[int, ...], Strict(False)] = ()  # which of data.path; default: `count`, evenly spread
    count: int = Field(6, ge=1, le=64)  # images that are drawn
    cache: CacheInput | None = None  # the teacher as cached: its views, tokens and attention
    caches: dict[str, CacheInput] = Field(default_factory=dict)  # several teachers: a name and a cache each
    teacher: TeacherConfig | None = None  # or a live one
    mask_ratio: float = Field(0.75, gt=0, lt=1)  # share of the patches that are hidden
    focus: Focus | None = None  # default: sampled by the teacher's attention, if any
    crop: float = Field(1.0, gt=0, le=1)  # central share of images that no cache gives a view of
    min_score: float = Field(0.5, ge=0, le=1)  # of what a detector shows
    seed: int = Field(0, ge=0)  # of the masks
    output: PathField | None = None  # the PNG; default: visualize.png in the run folder `init`

    @model_validator(mode="after")
    def _one_source_of_each(self) -> "VisualizeConfig":
        cached = bool(self.cache or self.caches)
        if bool(self.images) == (self.data is not None) and not (cached and not self.images):
            raise ValueError("give either images=[FILE,...] or data.path=...")
        if cached and (self.teacher or self.images):
            raise ValueError("cache.path brings its own teacher and views: give it with data.path alone")
        if self.cache and self.caches:
            raise ValueError("give one of cache.path and caches.NAME.path")
        return self
