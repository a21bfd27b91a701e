"""The keys of `benchmark extract`."""

from pydantic import Field

from pipeline.config import Config, PathField, Precision
from pipeline.configs.cache import StoreName
from pipeline.configs.data import DataConfig, ViewConfig
from pipeline.configs.teachers import TeacherConfig

FREE_SHARDS = 8  # only the first two or three are written from fresh memory


class BenchmarkExtractConfig(Config):
    """What is measured. The defaults take about three minutes of two cores."""

    data: DataConfig | None = None  # images; drawn ones of 224 x 224 when left out
    workers: int = Field(2, ge=0)  # decoding processes, for drawn images
    teacher: TeacherConfig | None = None  # a ViT-Ti of random weights when left out
    views: ViewConfig = ViewConfig()
    store: StoreName = "zarr"
    images: int = Field(512, ge=16)  # that each round takes
    batch_size: int = Field(64, ge=1)  # views per forward pass
    precision: Precision = "auto"
    free_views: int = Field(8192, ge=FREE_SHARDS)  # that each round with a free forward writes: 0.15 MB each
    rounds: int = Field(5, ge=1)  # after one that warms up; the median counts
    threads: int | None = Field(default=None, gt=0)  # CPU threads of the forward; torch's choice unless given
    folder: PathField | None = None  # where the caches go; the system's temporary folder when left out
