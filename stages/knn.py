"""Classify by nearest neighbours of features.

This is the cheapest measure of a checkpoint: frozen features, no training.

    mrmae knn init=runs/convvit data.path=/data/imagenet/train val.path=/data/imagenet/val

Reads labelled images (data.path, val.path) and a checkpoint (init). Without init it measures an untrained student
(student.name), a teacher (teacher.spec) or raw pixels (pixels=true). Writes metrics.json to output if given. Costs one
forward pass over the images.
"""

from typing import Any

from pipeline.assembly.frozen_features import frozen_features
from pipeline.evaluation.knn import knn_classify
from pipeline.evaluation.records import write_record
from pipeline.ownership import stage
from pipeline.processes import processes
from stages.configs.knn import KnnConfig


@stage
def run(config: KnnConfig) -> dict[str, Any]:
    """Returns top1, top5 and the number of images classified."""
    frozen, state = frozen_features(config), processes()
    share = slice(state.process_index, None, state.num_processes)
    result: dict[str, Any] = knn_classify(
        frozen._replace(train_x=frozen.train_x[share], train_y=frozen.train_y[share]),
        k=min(config.k, len(frozen.train_x)),
        temperature=config.temperature,
        device=state.device,
        shared=state.num_processes > 1,
    )
    result |= {"images": len(frozen.val_x)}
    write_record(config.output, "knn", result)
    return result
