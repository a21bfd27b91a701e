"""Train a classifier from a checkpoint or scratch.

Starts from a pre-trained checkpoint (init=RUN), or from scratch (student.name=...):

    mrmae finetune init=runs/convvit data.path=/data/imagenet output=runs/convvit-ft
    mrmae finetune --eval 'init=[runs/clip-ft,runs/dino-ft]' val.path=/data/imagenet/val
    mrmae finetune --eval 'init=[runs/a,runs/b,runs/c]' combine=greedy data.path=/data/imagenet/train val.share=0.02 \\
        test.path=/data/imagenet/val output=runs/abc

Reads labelled images: data.path and val.path, or data.path alone if it holds train/ and val/. Writes to output as
pretrain does, and checkpoints/best by top-1; --eval writes metrics.json and confusion.png to output if given. Prints
top-1 and top-5 on the validation set. Costs a full training of the encoder on all patches.

The defaults are MAE's fine-tuning recipe for ViT-B (layer decay, mixup, cutmix, RandAugment, erasing, smoothing).
--eval needs init and val.path alone. Several classifiers are evaluated by the mean of their logits, as the paper joins
students of different teachers. combine=uniform or greedy also averages the weights of several fine-tunings of one
student, and writes that soup to output/soup.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from pipeline.assembly.accuracies import LabelledCrops, accuracies
from pipeline.assembly.soups import Candidates, check_unseen, make_soup, save_soup
from pipeline.assembly.students import Start, load_classifier, read_start
from pipeline.configs.data import DataConfig, ViewConfig
from pipeline.data.augment import Augment, rand_augment
from pipeline.data.class_names import read_class_names
from pipeline.data.images import ImageSource
from pipeline.data.labelled import (
    LabelledBatch,
    LabelledDataset,
    match_classes,
    open_labelled,
    open_splits,
)
from pipeline.data.loader import Samples
from pipeline.data.order import EpochOrder
from pipeline.data.readable import leave_unreadable_out
from pipeline.errors import ConfigError
from pipeline.evaluation.metrics import class_accuracies
from pipeline.evaluation.pictures import draw_confusion
from pipeline.evaluation.records import write_record
from pipeline.models import Classifier, build_classifier, layer_ids, load_weights, model_record
from pipeline.ownership import stage
from pipeline.pixels import normalise
from pipeline.processes import processes
from pipeline.steps import StepPlan
from pipeline.training.engine import fit
from pipeline.training.journal import command
from pipeline.training.run import Run, plan_steps, settle_batch_size
from pipeline.training.task import Evaluation, Task
from stages.configs.finetune import EvaluateConfig, FinetuneConfig

_LOWEST = 3  # classes that --eval prints


@stage
def run(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune; returns the last metrics, top-1 and top-5 of the last checkpoint among them."""
    train, val, classes = open_splits(config.data, config.val)
    torch.manual_seed(config.seed)
    start = read_start(config.init, config.student, config.output)
    model = _build(config, start, classes)
    size = model.image_size[0]
    config = settle_batch_size(config, len(train))
    plan = plan_steps(config, len(train))
    _check_mixing(config, plan)
    identity = {
        "stage": "finetune",
        "model": model.spec,
        "init": start.identity,
        "data": train.digest(),
        "augment": config.augment.model_dump(mode="json"),
        "ema": config.ema.model_dump() if config.ema.decay else None,
        "classes": list(train.classes),
    }
    if config.class_names is not None:
        identity["class_names"] = list(_class_names(config.class_names, train, classes))
    training = Run(config.model_copy(update={"student": start.student}), identity)

    views = ViewConfig(image_size=size, scale=config.augment.scale, hflip=config.augment.hflip, seed=config.seed)
    dataset = LabelledDataset(train, size, views=views, augment=_augment(config, size))

    crops = _crops(config, val, size, (config.val or config.data).workers)

    def score(model: nn.Module, _step: int) -> dict[str, float]:
        return accuracies([model], crops)[0][0]

    task = Task(
        name="finetune",
        model=model,
        spec=model_record(model),
        losses=_Losses(config, classes),
        samples=Samples(dataset, EpochOrder(np.arange(len(train)), config.seed), config.data.workers),
        evaluation=Evaluation(score, config.eval_every * plan.steps_per_epoch, best="top1", images=len(val)),
        layer_ids=layer_ids(model)[0],
        ema=config.ema,
        next_commands=(
            command("report", str(config.output)),
            command("export", f"init={config.output}/checkpoints/best", f"output={config.output}/exported"),
        ),
    )
    return fit(task, training, plan, config.optim)


@stage
@torch.inference_mode()
def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Top-1 and top-5 of fine-tuned classifiers in fp32; of several, also of the mean of their logits or weights.

    Raises:
        ConfigError, CheckpointError: one of them is no classifier, they take different sizes, or make no soup.
        DataError: they know other classes than `val` has.
    """
    train, val = _open_val(config)
    measured = val if config.test is None else _open_only("test", config.test)
    device = processes().device
    models = []
    for path in config.init:
        model, names, folders = load_classifier(path, config.student, config.image_size)
        models.append(model.to(device).eval())
        measured = match_classes(measured, folders, len(names), f"init={path}")
        val = match_classes(val, folders, len(names), f"init={path}")
    sizes = {model.image_size[0] for model in models}
    if len(sizes) > 1:
        raise ConfigError(f"the classifiers take images of {sorted(sizes)} pixels: set image_size, for all of them")
    if len({model.head.out_features for model in models}) > 1:
        raise ConfigError("the classifiers have different numbers of classes: their logits can't be averaged")
    size, workers = sizes.pop(), config.val.workers
    soup = None
    if config.combine != "logits" and config.output is not None:
        candidates = Candidates(
            config.init, models, _trained_on(config, train, size), _crops(config, val, size, workers)
        )
        soup = make_soup(candidates, config.combine, config.output / "soup")
    rows, predicted = accuracies(models, _crops(config, measured, size, workers), soup and soup.model)
    result: dict[str, Any] = {**rows[-1], "images": len(measured)}
    if len(models) > 1:
        result["each"] = {str(path): row["top1"] for path, row in zip(config.init, rows, strict=False)}
    if soup:
        result |= {"logits": rows[len(models)], **soup.facts}
        if processes().is_main_process:
            save_soup(soup, result, config)
        result["written"] = str(soup.path)
    names = measured.classes if len(measured.classes) == len(names) else names  # the checkpoint may know numbers alone
    classes = class_accuracies(measured.labels, predicted.numpy(), names)
    inits = [str(path) for path in config.init]
    write_record(config.output, "finetune_eval", {**result, "init": inits, "classes": classes})
    if config.output is not None and processes().is_main_process:
        draw_confusion(config.output / "confusion.png", measured.labels, predicted.numpy(), names, ", ".join(inits))
    lowest = sorted(classes, key=lambda name: classes[name]["top1"])[:_LOWEST]
    return {**result, "lowest": {name: classes[name]["top1"] for name in lowest}}


def _crops(config: FinetuneConfig, source: ImageSource, size: int, workers: int) -> LabelledCrops:
    return LabelledCrops(LabelledDataset(source, size, crop=config.crop), config.eval_batch_size, workers)


def _trained_on(config: EvaluateConfig, train: ImageSource | None, size: int) -> LabelledCrops | None:
    """The images of the training, where `data.path` names them, after a look whether they leave those of `val` out."""
    if train is None:
        return None
    if config.val.share is not None:
        check_unseen(config.init, train.digest())
    return _crops(config, train, size, config.val.workers)


def _class_names(file: Path, train: ImageSource, classes: int) -> tuple[str, ...]:
    if train.classes:
        raise ConfigError("class_names is for classes that are numbers: data.path has class folders, which name them")
    return read_class_names(file, classes)


def _open_val(config: EvaluateConfig) -> tuple[ImageSource | None, ImageSource]:
    """The images of the training, where they are needed, and those that are held out."""
    if config.val.share is None:
        needed = config.combine != "logits" and config.data is not None
        train = _open_only("data", config.data) if needed and config.data else None
        return train, _open_only("val", config.val)
    if config.data is None:
        raise ConfigError(f"val.share={config.val.share} is a share of data.path: give data.path=..., as in training")
    return open_splits(config.data, config.val)[:2]


def _open_only(section: str, data: DataConfig) -> ImageSource:
    key = f"{section}.path"
    return leave_unreadable_out({key: open_labelled(key, data)})[0]


def _build(config: FinetuneConfig, start: Start, classes: int) -> Classifier:
    arguments = _resized(start.encoder, config)
    model = build_classifier(num_classes=classes, drop_path=config.drop_path, pool=config.pool, **arguments)
    if start.state is not None:
        load_weights(model, start.state, strict=False)
    return model


def _resized(encoder: dict[str, Any], config: FinetuneConfig) -> dict[str, Any]:
    """At the size that is wanted, if one is."""
    return encoder | ({"image_size": config.image_size} if config.image_size else {})


def _check_mixing(config: FinetuneConfig, plan: StepPlan) -> None:
    """timm mixes a batch with its own reverse, so it takes even ones alone.

    Raises:
        ConfigError: mixup or cutmix is on, and micro-batches are odd.
    """
    micro = plan.micro_batch
    if (config.augment.mixup or config.augment.cutmix) and micro % 2:
        raise ConfigError(
            f"mixup and cutmix want even micro-batches, but batch_size={plan.batch_size} gives {micro} images each "
            f"({plan.processes} processes x accum_iter={plan.accum_iter}): choose for instance "
            f"batch_size={(micro + 1) * plan.processes * plan.accum_iter}, or augment.mixup=0 augment.cutmix=0"
        )


def _augment(config: FinetuneConfig, size: int) -> Augment | None:
    policy = config.augment.rand_augment
    return None if policy is None else rand_augment(policy, size)


class _Losses:
    """A micro-batch → cross-entropy, with mixup, cutmix, erasing and smoothing on the device."""

    def __init__(self, config: FinetuneConfig, classes: int) -> None:
        augment = config.augment
        self.mixup = None
        if augment.mixup or augment.cutmix:
            self.mixup = Mixup(augment.mixup, augment.cutmix, label_smoothing=augment.smoothing, num_classes=classes)
        self.erase = RandomErasing(augment.erase, mode="pixel", device="cpu") if augment.erase else None
        self.hard: nn.Module = LabelSmoothingCrossEntropy(augment.smoothing)
        self.soft: nn.Module = SoftTargetCrossEntropy()

    def __call__(self, model: nn.Module, batch: LabelledBatch) -> dict[str, Tensor]:
        images, labels = normalise(batch.images), batch.labels
        if self.erase:
            self.erase.device = images.device
            images = self.erase(images)
        if self.mixup:
            images, labels = self.mixup(images, labels)
        loss = self.soft if labels.ndim == 2 else self.hard
        return {"loss": loss(model(images).float(), labels)}
