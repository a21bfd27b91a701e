"""The keys of `codes`."""

from pydantic import Field

from pipeline.config import Config, PathField
from pipeline.configs.cache import CacheInput


class CodesConfig(Config):
    """Everything `codes` takes."""

    cache: CacheInput  # of tokens
    output: PathField  # the folder of the new cache
    clusters: int = Field(4096, ge=2, le=65535)  # of the codebook
    calibration: int = Field(256, ge=1)  # samples that the codebook is fitted on, or more: 50 tokens a cluster
