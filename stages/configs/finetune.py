"""The keys of `finetune`."""

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, Strict, model_validator

from pipeline.config import Config, PathField
from pipeline.configs.data import DataConfig, ValConfig
from pipeline.configs.models import StudentConfig
from pipeline.configs.training import EmaConfig, OptimConfig, ShardedRunConfig

# What timm's rand_augment_transform reads. Other sections it ignores without a word, or fails on.
_POLICY = re.compile(r"rand(-(m|n|mmax|inc)\d+|-(mstd|p)\d+(\.\d+)?|-t(weights|3a|3aw))*")


class AugmentConfig(Config):
    """Augmentation and label noise; null or 0 switches a part off."""

    scale: tuple[float, float] = Field((0.08, 1.0), strict=False)  # random resized crop, share of the area
    hflip: float = Field(0.5, ge=0, le=1)  # probability of a mirrored image
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"  # timm's policy; null: none
    mixup: float = Field(0.8, ge=0)  # alpha of mixup; 0: none
    cutmix: float = Field(1.0, ge=0)  # alpha of cutmix; 0: none
    smoothing: float = Field(0.1, ge=0, lt=1)  # label smoothing
    erase: float = Field(0.25, ge=0, le=1)  # probability of random erasing

    @model_validator(mode="after")
    def _can_be_drawn(self) -> "AugmentConfig":
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"augment.scale={list(self.scale)}: needs 0 < low <= high <= 1")
        if self.rand_augment is not None and not _POLICY.fullmatch(self.rand_augment):
            raise ValueError(
                f"augment.rand_augment={self.rand_augment!r} is no policy of timm's: write it as in "
                "rand-m9-mstd0.5-inc1, or null"
            )
        return self


class FinetuneConfig(ShardedRunConfig):
    """Everything `finetune` takes."""

    epochs: int = Field(100, ge=1)
    data: DataConfig  # labelled training images, or a folder that holds train/ and val/
    val: ValConfig | None = None  # labelled validation images; default: val/ in data.path
    init: PathField | None = None  # a pre-training run, a checkpoint, a public weights file or timm:NAME
    student: StudentConfig | None = None  # needed from scratch and for a lone weights file
    # Names of classes that tars know by number: a JSON list or mapping, or a text of a name a line; kept in checkpoints
    class_names: PathField | None = None
    image_size: int | None = Field(None, ge=8, le=4096)  # pixels; default: the student's. Positions are resampled
    crop: float = Field(0.875, gt=0, le=1)  # central share of validation images; 1 for images cut already
    pool: Literal["mean", "cls"] = "mean"  # what the head sees: the mean of the patch tokens, or the class token
    drop_path: float = Field(0.1, ge=0, lt=1)  # stochastic depth of the last block, rising from 0
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig(blr=5e-4, min_lr=1e-6, warmup_epochs=5, betas=(0.9, 0.999), layer_decay=0.65)
    ema: EmaConfig = EmaConfig()
    eval_every: int = Field(1, ge=1)  # epochs
    eval_batch_size: int = Field(128, ge=1)  # validation images of a forward pass, in each process


def _several(value: object) -> object:
    return value if isinstance(value, list | tuple) else (value,)


class EvaluateConfig(FinetuneConfig):
    """What `finetune --eval` takes: the same keys, so that one section of a file serves both; it needs init and val."""

    init: Annotated[tuple[PathField, ...], BeforeValidator(_several), Strict(False)] = Field(min_length=1)  # type: ignore[assignment]  # one classifier or several
    val: ValConfig
    data: DataConfig | None = None  # type: ignore[assignment]  # read where val.share is given
    test: DataConfig | None = None  # labelled images that a greedy soup is measured on: val has chosen it
    # what top1 is of, for several: the mean of their logits, or of their weights (a soup), greedily chosen by val
    combine: Literal["logits", "uniform", "greedy"] = "logits"
    output: PathField | None = None  # type: ignore[assignment]  # folder for metrics.json and the soup

    @model_validator(mode="after")
    def _soup_is_whole(self) -> "EvaluateConfig":
        if self.combine != "logits" and (len(self.init) < 2 or self.output is None):
            raise ValueError(f"combine={self.combine} writes a soup of runs: give init=[RUN,RUN,...] and output")
        if (self.combine == "greedy") != (self.test is not None):
            raise ValueError(
                "combine=greedy wants test.path: images that did not choose the soup"
                if self.test is None
                else "test.path is for combine=greedy, which val chooses: give the images as val.path"
            )
        if self.test is not None and self.test.path == self.val.path:
            raise ValueError("test.path is val.path: a greedy soup is measured on images that did not choose it")
        return self
