"""The keys of `benchmark cache`."""

from typing import Annotated

from pydantic import Field, Strict

from pipeline.config import Config, PathField
from pipeline.configs.cache import QuantiserName


class BenchmarkCacheConfig(Config):
    """What is measured. The defaults take about two minutes and 5 GB of disk."""

    path: PathField | None = None  # an existing cache; a synthetic one of each store when left out
    folder: PathField | None = None  # where synthetic caches go; the system's temporary folder when left out
    samples: int = Field(default=8192, ge=16)  # of a synthetic cache; of a given one, how many are read
    samples_per_shard: int = Field(default=1024, ge=8)
    grid: int = Field(default=14, ge=1)
    dim: int = Field(default=768, ge=1)
    quantiser: QuantiserName = "int8"
    image_bytes: int = Field(default=25_000, ge=1)
    visible: float = Field(default=0.25, gt=0, le=1)  # share of the rows that are taken
    repeats: int = Field(default=11, ge=1)  # pairs; the median counts
    shards: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Strict(False)] = (100, 600, 1252)  # ascending
    shard_records: int = Field(default=4096, ge=1)  # read from that many shards
    seed: int = 0
