"""Train a linear head for segmentation on frozen features.

This measures how much single patches know, where knn and linear-probe see their mean:

    mrmae segment init=runs/photos output=runs/photos-ade labels.num_classes=150 labels.reduce_zero_label=true \\
        data.train.images=ade/images/training data.train.labels=ade/annotations/training \\
        data.val.images=ade/images/validation data.val.labels=ade/annotations/validation
    mrmae segment --eval init=runs/photos data.val.images=... data.val.labels=... output=runs/photos-ade pictures=8

Reads images and a label PNG for each, or COCO's masks (data.*.labels=instances_val2017.json), and what is frozen: a
checkpoint or an export (init), an untrained student (student.name) or a teacher (teacher.spec). Writes to output as
finetune does, and checkpoints/best by mIoU; --eval writes metrics.json and, with pictures=N, predictions.png. Prints
mIoU and pixel accuracy. Costs a forward pass over the images an epoch.

The head is a batch norm and one linear layer, as DINOv2 evaluates. Whole images are scored, by overlapping windows.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate.utils import reduce
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.assembly.scenes import OpenScenes
from pipeline.assembly.subjects import Subject, load_subject
from pipeline.configs.data import ViewConfig
from pipeline.configs.evaluation import SubjectConfig
from pipeline.configs.segmentation import LabelConfig
from pipeline.confusion import confusion_counts
from pipeline.data.loader import Samples, load_in_order
from pipeline.data.order import EpochOrder
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.evaluation.pictures import draw_grid
from pipeline.evaluation.records import write_record
from pipeline.models import read_weights
from pipeline.overrides import override_words
from pipeline.ownership import stage
from pipeline.processes import processes, share_of
from pipeline.progress import track
from pipeline.segmentation import (
    FolderScenes,
    SceneBatch,
    SceneCrops,
    SceneWindows,
    SegmentationHead,
    WindowBatch,
    class_scores,
    colour_labels,
    decode_scene,
    label_scene,
    mean_scores,
    segmentation_loss,
)
from pipeline.training.checkpoint import resolve_checkpoint
from pipeline.training.device import autocast_by
from pipeline.training.engine import fit
from pipeline.training.journal import command
from pipeline.training.run import Run, plan_steps, settle_batch_size
from pipeline.training.task import Evaluation, Task
from stages.configs.segment import SegmentConfig

_LARGEST_BATCH = 16  # of batch_size=auto: DINOv2's


@stage
def run(config: SegmentConfig, *, eval_only: bool = False) -> dict[str, Any]:
    """Train, or score a checkpoint; returns mIoU and pixel accuracy."""
    return _evaluate_only(config) if eval_only else _train(config)


def _train(config: SegmentConfig) -> dict[str, Any]:
    if config.data.train is None:
        raise ConfigError("'data.train' is missing: give data.train.images=... and data.train.labels=...")
    train = OpenScenes("data.train", config.data.train, config.labels)
    val = OpenScenes("data.val", config.data.val, config.labels)
    if train.names != val.names:
        raise DataError("data.train and data.val have different classes: give matching annotations")
    config = settle_batch_size(config, len(train.scenes), largest=_LARGEST_BATCH)
    plan = plan_steps(config, len(train.scenes))
    torch.manual_seed(config.seed)
    subject = load_subject(config, processes().device)
    head = _build_head(subject, val, config.labels)
    identity = {
        "stage": "segment",
        "features": head.spec["features"],
        "classes": list(train.names),
        "data": train.digest,
        "labels": head.spec["labels"],
        **({"label_files": train.scenes.label_digest()} if isinstance(train.scenes, FolderScenes) else {}),
        "crops": {"scale": list(config.scale), "hflip": config.hflip},
    }
    training = Run(config, identity)
    views = ViewConfig(image_size=subject.size, scale=config.scale, hflip=config.hflip, seed=config.seed)

    def losses(model: nn.Module, batch: SceneBatch) -> dict[str, Tensor]:
        with torch.no_grad(), training.accelerator.autocast():
            tokens = subject.tokens(batch.images)
        return {"loss": segmentation_loss(model(tokens, subject.grid), batch.labels)}

    def evaluate(model: nn.Module, _step: int) -> dict[str, float]:
        assert isinstance(model, SegmentationHead)
        return mean_scores(_count(subject, model, val, _batches(config, val, subject)))

    task = Task(
        name="segment",
        model=head,
        spec=head.spec,
        losses=losses,
        samples=Samples(
            SceneCrops(train.scenes, views), EpochOrder(np.arange(len(train.scenes)), config.seed), config.data.workers
        ),
        evaluation=Evaluation(evaluate, config.eval_every * plan.steps_per_epoch, best="mIoU"),
        next_commands=(_next_command(config),),
    )
    return fit(task, training, plan, config.optim)


def _next_command(config: SegmentConfig) -> str:
    """Score the newest checkpoint, and draw what it says."""
    keys = {*SubjectConfig.model_fields, "seed", "precision", "labels", "output"}  # an untrained student is its seed's
    given = config.model_dump(
        mode="json", include={**dict.fromkeys(keys, True), "data": {"val"}}, exclude_unset=True, exclude_none=True
    )
    return command("segment", "--eval", *override_words(given), "pictures=8")


def _evaluate_only(config: SegmentConfig) -> dict[str, Any]:
    state = processes()
    folder = resolve_checkpoint(config.checkpoint or config.output)
    weights, spec = read_weights(folder)
    if spec is None or spec.get("kind") != "segmentation head":
        raise CheckpointError(f"{folder} holds no segmentation head: give the output of a `segment` run")
    given = config.labels.model_dump(mode="json", exclude_unset=True)
    labels = LabelConfig.model_validate(spec["labels"] | given)  # what isn't given is as the head was trained
    val = OpenScenes("data.val", config.data.val, labels, names=spec["classes"])
    torch.manual_seed(config.seed)
    subject = load_subject(config, state.device)
    head = _build_head(subject, val, labels)
    if spec["features"] != head.spec["features"]:
        raise CheckpointError(f"{folder} was trained on other features: give the init, student or teacher that it had")
    if spec["classes"] != head.spec["classes"]:
        raise DataError("data.val has other classes than the head was trained on: give matching labels")
    head.load_state_dict(weights)
    head.to(state.device).eval()
    with torch.inference_mode(), autocast_by(config.precision):
        batches = _batches(config, val, subject)
        steps = -(-len(share_of(len(val.scenes))) // config.eval_batch_size)
        counts = _count(subject, head, val, track(batches, steps, "segment", "batch"))
        scores = mean_scores(counts)
        record = {**scores, "images": len(val.scenes), "classes": class_scores(counts, val.names)}
        write_record(config.output, "segment", record)
        if state.is_main_process and config.pictures:
            _draw(config, subject, head, val)
    return {**scores, "images": len(val.scenes)}


def _build_head(subject: Subject, scenes: OpenScenes, labels: LabelConfig) -> SegmentationHead:
    blank = torch.zeros(1, 3, subject.size, subject.size, dtype=torch.uint8)
    with torch.no_grad():
        dim = subject.tokens(blank).shape[-1]
    spec = {
        "kind": "segmentation head",
        "features": f"{xxhash.xxh3_128_hexdigest(subject.name.encode())} at {subject.size} pixels",
        "classes": list(scenes.names),
        "labels": labels.model_dump(mode="json", exclude={"class_names"}),
    }
    return SegmentationHead(dim, len(scenes.names), spec)


def _batches(config: SegmentConfig, val: OpenScenes, subject: Subject) -> Iterable[WindowBatch]:
    windows = SceneWindows(val.scenes, subject.size, subject.grid[0])
    return load_in_order(windows, share_of(len(val.scenes)), config.eval_batch_size, config.data.workers)


def _count(
    subject: Subject, head: SegmentationHead, val: OpenScenes, batches: Iterable[WindowBatch]
) -> NDArray[np.int64]:
    """The confusion matrix of all pixels, over all processes."""
    classes = len(val.names)
    counts = torch.zeros(classes, classes, dtype=torch.int64, device=processes().device)
    for batch in batches:
        for labels, predicted in zip(batch.labels, _predict(subject, head, batch), strict=True):
            counts += confusion_counts(labels.to(predicted.device), predicted, classes)
    total: Tensor = reduce(counts, "sum")
    confusion: NDArray[np.int64] = total.cpu().numpy()
    return confusion


def _predict(subject: Subject, head: SegmentationHead, batch: WindowBatch) -> list[Tensor]:
    """The labels [H, W] of each image."""
    tokens = subject.tokens(batch.windows.to(processes().device))
    parts = head(tokens, subject.grid).split([len(corners) for corners in batch.corners])
    sizes = [(labels.shape[0], labels.shape[1]) for labels in batch.labels]
    return [label_scene(*image) for image in zip(parts, batch.corners, batch.cells, sizes, strict=True)]


def _draw(config: SegmentConfig, subject: Subject, head: SegmentationHead, val: OpenScenes) -> None:
    """Evenly spread images, their labels and the predictions, as columns."""
    count = min(config.pictures, len(val.scenes))
    chosen = [place * len(val.scenes) // count for place in range(count)]
    windows = SceneWindows(val.scenes, subject.size, subject.grid[0])
    columns: dict[str, list[Any]] = {"image": [], "labels": [], "predicted": []}
    for index in chosen:
        image, labels = decode_scene(val.scenes, index)
        (predicted,) = _predict(subject, head, windows.__getitems__([(0, index)]))
        columns["image"].append(np.asarray(image))
        columns["labels"].append(colour_labels(labels))
        columns["predicted"].append(colour_labels(predicted.cpu().numpy()))
    names = [val.scenes.key(index) for index in chosen]
    draw_grid(config.output / "predictions.png", columns, str(config.checkpoint or config.output), names)
