"""The keys of `pretrain`."""

from typing import ClassVar

from pydantic import Field, model_validator

from pipeline.config import Config, PathField
from pipeline.configs.cache import CacheInput
from pipeline.configs.data import MaskConfig, OrderKind, ViewConfig
from pipeline.configs.evaluation import KnnCallbackConfig
from pipeline.configs.models import MimicConfig, StudentConfig
from pipeline.configs.teachers import TeacherConfig
from pipeline.configs.training import OptimConfig, ShardedRunConfig


class PretrainData(Config):
    """The images; a webdataset cache holds them itself and needs no path."""

    main_key: ClassVar[str] = "path"

    path: str | None = Field(None, min_length=1)  # as in extraction
    limit: int | None = Field(None, gt=0)  # as in extraction
    workers: int = Field(2, ge=0, le=256)  # decoding processes per training process


class OrderConfig(Config):
    """In which order an epoch visits its samples."""

    # block: shuffle inside windows of shards, for disks that hate random reads; by default for remote caches alone
    kind: OrderKind | None = None
    window: int = Field(16, ge=1)  # shards


class PretrainConfig(ShardedRunConfig):
    """Everything `pretrain` takes."""

    data: PretrainData = PretrainData()
    cache: CacheInput | None = None
    caches: dict[str, CacheInput] = Field(default_factory=dict)  # several teachers: a name and a cache each
    teacher: TeacherConfig | None = None  # in place of a cache: run it in every step
    teachers: dict[str, TeacherConfig] = Field(default_factory=dict)  # several of them
    views: ViewConfig = ViewConfig()  # without a cache; a cache brings its own
    student: StudentConfig = StudentConfig()
    mimic: MimicConfig = MimicConfig()
    mask: MaskConfig = MaskConfig()
    order: OrderConfig = OrderConfig()
    optim: OptimConfig = OptimConfig()
    init: PathField | None = None  # start from these weights: a run, a checkpoint, a public file or timm:NAME
    knn: KnnCallbackConfig | None = None  # classify by nearest neighbours every few epochs; the best checkpoint is kept
    check_records: int = Field(32, ge=0)  # random records held against the live images before the first step
    grad_norms_every: int = Field(500, ge=0)  # steps between measurements of each loss's pull; 0: never

    @model_validator(mode="after")
    def _one_way_to_name_teachers(self) -> "PretrainConfig":
        if sum(map(bool, (self.cache, self.caches, self.teacher, self.teachers))) > 1:
            raise ValueError("give one of cache.path, caches.NAME.path, teacher.spec and teachers.NAME.spec")
        return self
