"""`mrmae linear-probe`: linear classifiers on frozen features, several learning rates at once.

    mrmae linear-probe init=runs/convvit data.path=/data/imagenet/train val.path=/data/imagenet/val

The recipe is MAE's: LARS, no weight decay, an affine-free batch norm before the classifier.
"""

from typing import Annotated, Any

from pydantic import Field, Strict

from pipeline.evaluation.probe import linear_probe
from pipeline.evaluation.records import write_record
from pipeline.frozen import FrozenConfig, frozen_features
from pipeline.processes import processes


class LinearProbeConfig(FrozenConfig):
    """Everything `linear-probe` takes."""

    epochs: int = Field(90, ge=1)
    batch_size: int = Field(4096, ge=1)
    blrs: Annotated[tuple[float, ...], Strict(False)] = (
        0.02,
        0.05,
        0.1,
        0.2,
        0.5,
    )  # per 256 images, all trained at once


def run(config: LinearProbeConfig) -> dict[str, Any]:
    """Returns top1 and top5 of the best learning rate, and every rate's."""
    frozen = frozen_features(config)
    batch_size = min(config.batch_size, len(frozen.train_x))
    result = linear_probe(
        frozen.train_x,
        frozen.train_y,
        frozen.val_x,
        frozen.val_y,
        num_classes=frozen.num_classes,
        epochs=config.epochs,
        batch_size=batch_size,
        lrs=tuple(blr * batch_size / 256 for blr in config.blrs),
        seed=config.seed,
        device=processes().device,
    )
    write_record(config.output, "linear_probe", result)
    return dict(result)
