"""Train linear classifiers on frozen features.

This measures how much a checkpoint knows, without fine-tuning:

    mrmae linear-probe init=runs/convvit data.path=/data/imagenet/train val.path=/data/imagenet/val

Reads labelled images (data.path, val.path) and a checkpoint (init). Writes metrics.json to output if given. Costs one
forward pass over the images, then minutes for all learning rates at once.

The recipe is MAE's: LARS, no weight decay, an affine-free batch norm before the classifier. Batch and learning rates
adapt to the number of images, unless batch_size and blrs are given.
"""

import logging
from typing import Any

from pipeline.assembly.frozen_features import frozen_features
from pipeline.evaluation.probe import fitting_lrs, linear_probe
from pipeline.evaluation.records import write_record
from pipeline.ownership import stage
from pipeline.processes import processes
from pipeline.steps import fit_batch_size
from stages.configs.linear_probe import LinearProbeConfig

log = logging.getLogger(__name__)

_FEW_STEPS = 50  # the first ninth only warms up, and the batch norm's means take tens of steps to forget their start


@stage
def run(config: LinearProbeConfig) -> dict[str, Any]:
    """Returns top1 and top5 of the best learning rate, and every rate's."""
    frozen = frozen_features(config)
    count = len(frozen.train_x)
    batch_size = fit_batch_size(count, 2, largest=4096) if config.batch_size == "auto" else config.batch_size
    batch_size = min(batch_size, count)
    steps = config.epochs * (count // batch_size)
    if steps < _FEW_STEPS:
        log.warning("%d steps train a classifier but little: lower batch_size or raise epochs", steps)
    lrs = tuple(blr * batch_size / 256 for blr in config.blrs) if config.blrs else fitting_lrs(steps)
    if processes().is_main_process:
        log.info("%d steps of %d images, learning rates %s", steps, batch_size, ", ".join(f"{lr:.3g}" for lr in lrs))
    result = linear_probe(
        frozen,
        epochs=config.epochs,
        batch_size=batch_size,
        lrs=lrs,
        seed=config.seed,
        device=processes().device,
    )
    _warn_at_the_edge(tuple(lr * 256 / batch_size for lr in lrs), [figures["top1"] for figures in result["all"]])
    result |= {"images": len(frozen.val_x)}
    write_record(config.output, "linear_probe", result)
    return result


def _warn_at_the_edge(blrs: tuple[float, ...], top1: list[float]) -> None:
    """Where no rate inside the grid is as good as the outermost one, a better one may lie beyond it."""
    best = [blr for blr, score in zip(blrs, top1, strict=True) if score == max(top1)]
    lowest, highest = min(blrs), max(blrs)
    if lowest < highest and not any(lowest < blr < highest for blr in best):
        edge, further = (highest, 3 * highest) if highest in best else (lowest, lowest / 3)
        log.warning(
            "the best of blrs is the outermost, %g: a better rate may lie beyond; add for instance %g",
            edge,
            float(f"{further:.1g}"),
        )
