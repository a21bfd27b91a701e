"""The keys of `linear-probe`."""

from typing import Annotated, Literal

from pydantic import Field, Strict

from pipeline.configs.evaluation import FrozenConfig


class LinearProbeConfig(FrozenConfig):
    """Everything `linear-probe` takes."""

    epochs: int = Field(90, ge=1)  # passes over the features
    # auto: the largest of 4096, 2048, ... that leaves 8 steps an epoch. The batch norm wants two images
    batch_size: Annotated[int, Field(ge=2)] | Literal["auto"] = "auto"
    # Learning rates per 256 images, all trained at once; default: by the number of steps
    blrs: Annotated[tuple[float, ...], Strict(False), Field(min_length=1)] | None = None
