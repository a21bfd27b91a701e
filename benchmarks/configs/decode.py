"""The keys of `benchmark decode`."""

from pydantic import Field

from pipeline.config import Config
from pipeline.configs.data import DataConfig


class BenchmarkDecodeConfig(Config):
    """What is measured. The defaults take about half a minute."""

    data: DataConfig
    images: int = Field(256, ge=1)  # evenly spread over the dataset
    rounds: int = Field(9, ge=1)  # medians over the rounds' own ratios
