"""The keys of `linear-probe`."""

from typing import Annotated

from pydantic import Field, Strict

from pipeline.configs.evaluation import FrozenConfig


class LinearProbeConfig(FrozenConfig):
    """Everything `linear-probe` takes."""

    epochs: int = Field(90, ge=1)  # passes over the features
    batch_size: int = Field(4096, ge=2)  # the batch norm wants two
    # Per 256 images, all trained at once.
    blrs: Annotated[tuple[float, ...], Strict(False)] = Field((0.02, 0.05, 0.1, 0.2, 0.5), min_length=1)
