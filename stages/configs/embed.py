"""The keys of `embed`."""

from typing import Literal

from pydantic import Field

from pipeline.config import PathField
from pipeline.configs.data import GivenImages
from pipeline.configs.evaluation import SubjectConfig


class EmbedConfig(SubjectConfig, GivenImages):
    """Everything `embed` takes."""

    pool: Literal["mean", "none"] = "mean"  # one feature an image, the mean of its patch tokens; none: every token
    seed: int = Field(0, ge=0)  # of an untrained student
    output: PathField  # the file: .safetensors, .npz or .parquet
