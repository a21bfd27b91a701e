"""The keys of `knn`."""

from pydantic import Field

from pipeline.configs.evaluation import FrozenConfig


class KnnConfig(FrozenConfig):
    """Everything `knn` takes."""

    k: int = Field(20, ge=1)  # neighbours that vote
    temperature: float | None = Field(
        0.07, gt=0
    )  # of the votes, as in DINO's protocol; null: every neighbour counts one
