"""`mrmae finetune`: a classifier on a pre-trained encoder, or from scratch; top-1 and top-5 on a validation set.

    mrmae finetune init=runs/convvit data.path=/data/imagenet/train val.path=/data/imagenet/val output=runs/convvit-ft

The defaults are MAE's fine-tuning recipe for ViT-B (layer decay, mixup, cutmix, RandAugment, erasing, smoothing).
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from pipeline.assembly import normalise
from pipeline.config import Config, PathField
from pipeline.data.images import DataConfig, ImageSource, open_images
from pipeline.data.labelled import LabelledBatch, LabelledDataset, evaluation_batches
from pipeline.data.loader import StepSampler, load
from pipeline.data.order import EpochOrder
from pipeline.data.views import ViewConfig
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.metrics import topk_accuracy
from pipeline.models import Classifier, build_classifier, layer_ids, load_weights, model_record, read_weights
from pipeline.models.config import StudentConfig
from pipeline.training.checkpoint import resolve_checkpoint
from pipeline.training.ema import EmaConfig
from pipeline.training.engine import fit
from pipeline.training.optim import OptimConfig
from pipeline.training.run import Run, RunConfig, StepPlan


class AugmentConfig(Config):
    """Augmentation and label noise; null or 0 switches a part off."""

    scale: tuple[float, float] = Field((0.08, 1.0), strict=False)  # random resized crop, share of the area
    hflip: float = Field(0.5, ge=0, le=1)
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    mixup: float = Field(0.8, ge=0)
    cutmix: float = Field(1.0, ge=0)
    smoothing: float = Field(0.1, ge=0, lt=1)
    erase: float = Field(0.25, ge=0, le=1)  # probability of random erasing


class FinetuneConfig(RunConfig):
    """Everything `finetune` takes."""

    epochs: int = Field(100, ge=1)
    data: DataConfig  # labelled training images
    val: DataConfig  # labelled validation images
    init: PathField | None = None  # a pre-training run, a checkpoint or a public weights file
    student: StudentConfig | None = None  # needed from scratch and for a lone weights file
    image_size: int = Field(224, ge=8, le=4096)
    crop: float = Field(0.875, gt=0, le=1)  # central share of validation images; 1 for images cut already
    pool: Literal["mean", "cls"] = "mean"
    drop_path: float = Field(0.1, ge=0, lt=1)
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig(blr=5e-4, min_lr=1e-6, warmup_epochs=5, betas=(0.9, 0.999), layer_decay=0.65)
    ema: EmaConfig = EmaConfig()
    eval_every: int = Field(1, ge=1)  # epochs


def run(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune; returns top-1 and top-5 of the last and the best checkpoint."""
    train, val = open_images(config.data.path, config.data.limit), open_images(config.val.path, config.val.limit)
    classes = _classes(train, val)
    torch.manual_seed(config.seed)
    model = _build(config, classes)
    identity = {"stage": "finetune", "seed": config.seed, "batch_size": config.batch_size, "model": model.spec}
    identity |= {"ema": config.ema.model_dump() if config.ema.decay else None}
    run = Run(config, {**identity, "data": train.digest(), "augment": config.augment.model_dump(mode="json")})
    plan = StepPlan.of(len(train), config, run.processes)

    views = ViewConfig(
        image_size=config.image_size, scale=config.augment.scale, hflip=config.augment.hflip, seed=config.seed
    )
    dataset = LabelledDataset(train, config.image_size, views=views, augment=_augment(config))
    order = EpochOrder(np.arange(len(train)), config.seed)

    def batches(start_step: int) -> Any:
        sampler = StepSampler(
            order, plan.batch_size, plan.accum_iter, run.rank, run.processes, start_step, plan.total_steps
        )
        return load(dataset, sampler, config.data.workers)

    def evaluate(model: nn.Module, _step: int) -> dict[str, float]:
        batches = evaluation_batches(val, config.image_size, config.crop, config.val.workers, run.rank, run.processes)
        return _evaluate(model, batches, run)

    return fit(
        run,
        model,
        model_record(model),
        _Losses(config, classes),
        batches,
        plan,
        config.optim,
        layer_ids=layer_ids(model)[0],
        evaluate=evaluate,
        evaluate_every=config.eval_every * plan.steps_per_epoch,
        best="top1",
        ema=config.ema,
        label="finetune",
    )


def _classes(train: ImageSource, val: ImageSource) -> int:
    """The number of classes; raises DataError if there is but one, or validation has others."""
    if train.classes and val.classes and train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))[:3]
        raise DataError(
            f"data.path and val.path have different classes (such as {', '.join(odd)}): give matching folders"
        )
    classes = train.num_classes
    if classes < 2:
        raise DataError(f"data.path holds {classes} class: fine-tuning needs two or more class folders")
    if val.num_classes > classes:
        raise DataError(f"val.path has label {val.num_classes - 1}, data.path only labels up to {classes - 1}")
    return classes


def _build(config: FinetuneConfig, classes: int) -> Classifier:
    state, spec = (None, None)
    if config.init:
        state, spec = read_weights(resolve_checkpoint(config.init))
    if config.student is None and spec is None:
        raise ConfigError("give init=RUN, or student.name=... to train from scratch or from a lone weights file")
    student = config.student or StudentConfig.model_validate(
        {key: value for key, value in (spec or {}).items() if key in StudentConfig.model_fields} or {}
    )
    arguments = student.encoder_arguments() | {"image_size": config.image_size}
    model = build_classifier(num_classes=classes, drop_path=config.drop_path, pool=config.pool, **arguments)
    if state is not None:
        load_weights(model, state, strict=False)
    return model


def _augment(config: FinetuneConfig) -> Callable[[Any], Any] | None:
    if config.augment.rand_augment is None:
        return None
    # timm fills what a shift uncovers with the mean colour.
    return rand_augment_transform(  # type: ignore[no-any-return]
        config.augment.rand_augment, {"translate_const": int(config.image_size * 0.45), "img_mean": (124, 116, 104)}
    )


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
        if self.mixup and len(images) % 2 == 0:  # timm mixes a batch with its own reverse
            images, labels = self.mixup(images, labels)
        loss = self.soft if labels.ndim == 2 else self.hard
        return {"loss": loss(model(images).float(), labels)}


def _evaluate(model: nn.Module, batches: Any, run: Run) -> dict[str, float]:
    hits = torch.zeros(3, dtype=torch.float64, device=run.device)
    for batch in batches:
        moved = batch.to(run.device)
        shares = topk_accuracy(model(normalise(moved.images)), moved.labels, (1, 5))
        hits += torch.tensor([shares["top1"], shares["top5"], 1.0], device=run.device) * len(moved.labels)
    total = run.accelerator.reduce(hits, "sum")
    return {"top1": float(total[0] / total[2]), "top5": float(total[1] / total[2])}
