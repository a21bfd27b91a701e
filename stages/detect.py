"""Train Mask R-CNN from a checkpoint or scratch.

Starts from a pre-trained checkpoint (init=RUN), or from scratch (student.name=...):

    mrmae detect init=runs/convvit output=runs/convvit-coco \\
        data.train.images=coco/train2017 data.train.annotations=coco/annotations/instances_train2017.json \\
        data.val.images=coco/val2017 data.val.annotations=coco/annotations/instances_val2017.json
    mrmae detect --eval data.val.images=... data.val.annotations=... output=runs/convvit-coco pictures=8

Reads annotated images in COCO's format. Writes to output as finetune does, and checkpoints/best by box AP; --eval
writes metrics.json, predictions.json and, with pictures=N, predictions.png. Prints box and mask AP. Costs many times a
fine-tuning: see docs/detection.md.

The defaults are ConvMAE's recipe of 25 epochs where it is published; docs/detection.md says what is ours.
"""

import json
from collections.abc import Generator, Iterable
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from pipeline.assembly.detectors import build_detector, load_detector
from pipeline.assembly.students import Start, read_start
from pipeline.data.loader import Samples, load_in_order
from pipeline.data.order import EpochOrder
from pipeline.data.readable import leave_unreadable_out
from pipeline.detection import (
    CocoConfig,
    CocoImages,
    DetectionBatch,
    DetectionDataset,
    Detector,
    annotated_scene,
    as_results,
    average_precision,
    detected_scene,
    draw_scenes,
    open_coco,
)
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.records import write_record
from pipeline.files import write_text
from pipeline.ownership import stage
from pipeline.pixels import normalise
from pipeline.processes import processes, share_of
from pipeline.progress import track
from pipeline.training.device import autocast_by
from pipeline.training.engine import fit
from pipeline.training.journal import command
from pipeline.training.run import Run, plan_steps, settle_batch_size
from pipeline.training.task import Evaluation, Task
from stages.configs.detect import DetectConfig, DetectionDataConfig

_LARGEST_BATCH = 32  # of batch_size=auto: ConvMAE's


@stage
def run(config: DetectConfig, *, eval_only: bool = False) -> dict[str, Any]:
    """Train, or score a checkpoint; returns box and mask AP."""
    return _evaluate_only(config) if eval_only else _train(config)


def _train(config: DetectConfig) -> dict[str, Any]:
    train, val = _open_both(config.data)
    config = settle_batch_size(config, len(train), largest=_LARGEST_BATCH)
    torch.manual_seed(config.seed)
    start = read_start(config.init, config.student, config.output)
    model, layers = _build(config, start, train)
    identity = {
        "stage": "detect",
        "model": model.spec,
        "init": start.identity,
        "ema": config.ema.model_dump() if config.ema.decay else None,
        "data": train.digest,
        "jitter": config.jitter.model_dump(mode="json"),
    }
    training = Run(config.model_copy(update={"student": start.student}), identity)
    plan = plan_steps(config, len(train))
    dataset = DetectionDataset(train, config.image_size, jitter=config.jitter, seed=config.seed)

    def evaluate(model: nn.Module, _step: int) -> dict[str, float]:
        assert isinstance(model, Detector)
        return _score(val, _results(model, val, _evaluation_batches(config, val, config.image_size), training.device))

    task = Task(
        name="detect",
        model=model,
        spec=model.spec,
        losses=_losses,
        samples=Samples(dataset, EpochOrder(np.arange(len(train)), config.seed), config.data.workers),
        evaluation=Evaluation(evaluate, config.eval_every * plan.steps_per_epoch, best="box_AP"),
        layer_ids=layers,
        ema=config.ema,
        next_commands=(_next_command(config),),
    )
    return fit(task, training, plan, config.optim)


def _next_command(config: DetectConfig) -> str:
    """Score the newest checkpoint, and draw what it finds."""
    val = config.data.val
    words = (f"data.val.images={val.images}", f"data.val.annotations={val.annotations}", f"output={config.output}")
    return command("detect", "--eval", *words, "pictures=8")


def _evaluate_only(config: DetectConfig) -> dict[str, Any]:
    group = processes()
    (val,) = leave_unreadable_out({"data.val": _open(config.data.val)})
    val.check_scorable("data.val")
    model = load_detector(config.checkpoint or config.output).to(group.device).eval()
    if model.spec["categories"] != [list(category) for category in val.categories]:
        raise DataError("data.val has other categories than the detector was trained on: give matching annotations")
    canvas = model.spec["encoder"]["image_size"]
    batches = _evaluation_batches(config, val, canvas)
    with torch.inference_mode(), autocast_by(config.precision):
        steps = -(-len(share_of(len(val))) // config.eval_batch_size)
        results = _results(model, val, track(batches, steps, "detect", "batch"), group.device)
        figures = _score(val, results)
        if group.is_main_process:
            write_text(config.output / "predictions.json", json.dumps(results) + "\n")
            write_record(config.output, "detect", {**figures, "images": len(val)})
            _draw(config, model, val, group.device)
    return figures


def _evaluation_batches(config: DetectConfig, val: CocoImages, canvas: int) -> Generator[DetectionBatch, None, None]:
    return load_in_order(DetectionDataset(val, canvas), share_of(len(val)), config.eval_batch_size, config.data.workers)


def _open(config: CocoConfig) -> CocoImages:
    return open_coco(config.images, config.annotations, config.limit)


def _open_both(data: DetectionDataConfig) -> tuple[CocoImages, CocoImages]:
    if data.train is None:
        raise ConfigError("'data.train' is missing: give data.train.images=... and data.train.annotations=...")
    train, val = leave_unreadable_out({"data.train": _open(data.train), "data.val": _open(data.val)})
    train.check_trainable("data.train")
    val.check_scorable("data.val")
    if train.categories != val.categories:
        odd = sorted(set(train.categories) ^ set(val.categories))[:3]
        raise DataError(f"data.train and data.val have different categories (such as {odd}): give matching annotations")
    return train, val


def _build(config: DetectConfig, start: Start, train: CocoImages) -> tuple[Detector, dict[str, int]]:
    encoder = start.encoder | {"image_size": config.image_size, "drop_path": config.drop_path}
    return build_detector(encoder, train.categories, start.state, **config.detector.model_dump())


def _losses(model: nn.Module, batch: DetectionBatch) -> dict[str, Tensor]:
    losses: dict[str, Tensor] = model(normalise(batch.images), batch.sizes, batch.targets)
    return losses


def _results(
    model: Detector, coco: CocoImages, batches: Iterable[DetectionBatch], device: torch.device
) -> list[dict[str, Any]]:
    """What this process's share of the images shows, gathered from all processes."""
    results: list[dict[str, Any]] = []
    for batch in batches:
        found = model.detect(normalise(batch.images.to(device)), batch.sizes, batch.original_sizes)
        for index, instances in zip(batch.indices, found, strict=True):
            results += as_results(instances, coco, index)
    gathered: list[dict[str, Any]] = gather_object(results)
    return gathered


def _score(coco: CocoImages, results: list[dict[str, Any]]) -> dict[str, float]:
    """Computed once, known to every process."""
    figures = [average_precision(coco, results) if processes().is_main_process else None]
    scored: dict[str, float] = broadcast_object_list(figures)[0]
    return scored


def _draw(config: DetectConfig, model: Detector, val: CocoImages, device: torch.device) -> None:
    if not config.pictures:
        return
    count = min(config.pictures, len(val))
    chosen = [place * len(val) // count for place in range(count)]
    dataset = DetectionDataset(val, model.spec["encoder"]["image_size"])
    found = []
    for start in range(0, count, config.eval_batch_size):
        batch = dataset.__getitems__([(0, index) for index in chosen[start : start + config.eval_batch_size]])
        found += model.detect(normalise(batch.images.to(device)), batch.sizes, batch.original_sizes)
    annotated = [annotated_scene(val, index) for index in chosen]
    detected = [
        detected_scene(scene.image, instances, val.categories, config.picture_score)
        for scene, instances in zip(annotated, found, strict=True)
    ]
    columns = {"annotated": annotated, f"detected, score ≥ {config.picture_score}": detected}
    draw_scenes(config.output / "predictions.png", columns, f"{config.checkpoint or config.output}")
