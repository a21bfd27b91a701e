"""Stage 2, `mrmae pretrain`: a student learns from images and cached targets; no step runs a teacher.

    mrmae pretrain data.path=/data/imagenet/train cache.path=/data/clip student.name=mrmae_convvit_base_patch16 \
        output=runs/convvit

With objective=mae and no cache it is plain MAE, on views drawn by the same function.
"""

import functools
import logging
import operator
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.assembly import normalise
from pipeline.cache import CacheReader, Quantiser, open_cache
from pipeline.config import Config, PathField
from pipeline.data.images import ImageSource, open_images
from pipeline.data.loader import PretrainBatch, PretrainDataset, StepSampler, load
from pipeline.data.order import EpochOrder
from pipeline.data.rendering import preprocessing
from pipeline.data.views import ViewConfig
from pipeline.errors import CacheError, ConfigError
from pipeline.models import Student, build_student, load_weights, model_record, read_weights
from pipeline.models.config import MimicConfig, StudentConfig
from pipeline.training.checkpoint import resolve_checkpoint
from pipeline.training.engine import fit
from pipeline.training.optim import OptimConfig
from pipeline.training.run import Run, RunConfig, StepPlan

log = logging.getLogger(__name__)


class CacheInput(Config):
    """One cache to learn from."""

    path: PathField


class PretrainData(Config):
    """The images; a webdataset cache holds them itself and needs no path."""

    path: str | None = Field(None, min_length=1)  # as in extraction
    limit: int | None = Field(None, gt=0)  # as in extraction
    workers: int = Field(2, ge=0, le=256)  # decoding processes per training process


class MaskConfig(Config):
    """Which patches the encoder sees."""

    mask_ratio: float = Field(0.75, gt=0, lt=1)
    focus: Literal["sampled", "top-k", "random"] = "sampled"  # by the teacher's attention; random without a cache
    masks_per_sample: int = Field(1, ge=1, le=8)  # masks trained of each image read; batch_size counts masks


class OrderConfig(Config):
    """In which order an epoch visits its samples."""

    kind: Literal["full", "block"] = "full"  # block: shuffle inside windows of shards, for disks that hate random reads
    window: int = Field(16, ge=1)  # shards


class PretrainConfig(RunConfig):
    """Everything `pretrain` takes."""

    data: PretrainData = PretrainData()
    cache: CacheInput | None = None
    caches: dict[str, CacheInput] = Field(default_factory=dict)  # several teachers: a name and a cache each
    views: ViewConfig = ViewConfig()  # without a cache; a cache brings its own
    student: StudentConfig = StudentConfig()
    mimic: MimicConfig = MimicConfig()
    mask: MaskConfig = MaskConfig()
    order: OrderConfig = OrderConfig()
    optim: OptimConfig = OptimConfig()
    init: PathField | None = None  # start from these weights: a run, a checkpoint or a public file

    @model_validator(mode="after")
    def _one_way_to_name_caches(self) -> "PretrainConfig":
        if self.cache and self.caches:
            raise ValueError("give cache.path or caches.NAME.path, not both")
        return self


def run(config: PretrainConfig) -> dict[str, Any]:
    """Train to the end, or to the next interruption; returns the last metrics."""
    caches = _open_caches(config)
    views = _views(config, caches)
    source = _open_source(config, caches)
    student = _build(config, caches)
    if config.init:
        state, _ = read_weights(resolve_checkpoint(config.init))
        load_weights(student, state, strict=False)
    live = _live(caches) if caches else np.arange(len(source or ()), dtype=np.int64)

    run = Run(config, _identity(config, caches, student, views, source))
    plan = StepPlan.of(len(live), config, run.processes, per_image=config.mask.masks_per_sample)
    patches = student.grid[0] * student.grid[1]
    dataset = PretrainDataset(
        source,
        caches,
        views,
        patches=patches,
        keep=max(1, int(patches * (1 - config.mask.mask_ratio))),
        focus=_focus(config, caches),
        rows=student.target_rows,
        masks_per_sample=config.mask.masks_per_sample,
        seed=config.seed,
    )
    block = next(iter(caches.values())).header.samples_per_shard if caches else 1024
    order = EpochOrder(live, config.seed, config.order.kind, block, config.order.window)

    def batches(start_step: int) -> Iterator[PretrainBatch]:
        images = plan.batch_size // config.mask.masks_per_sample
        sampler = StepSampler(order, images, plan.accum_iter, run.rank, run.processes, start_step, plan.total_steps)
        return load(dataset, sampler, config.data.workers)

    losses = _Losses({name: cache.header.quantiser for name, cache in caches.items()})
    return fit(run, student, model_record(student), losses, batches, plan, config.optim, label="pretrain")


class _Losses:
    """A micro-batch → the student's losses: targets dequantised and pixels normalised on the device."""

    def __init__(self, quantisers: dict[str, Quantiser]) -> None:
        self._quantisers = quantisers

    def __call__(self, student: nn.Module, batch: PretrainBatch) -> dict[str, Tensor]:
        targets = {
            name: self._quantisers[name].dequantise(values, scale) for name, (values, scale) in batch.targets.items()
        }
        losses: dict[str, Tensor] = student(normalise(batch.images), batch.ids_keep, targets)
        return losses


def _open_caches(config: PretrainConfig) -> dict[str, CacheReader]:
    if config.mimic.objective == "mae" and not (config.cache or config.caches):
        return {}
    if config.cache:
        reader = open_cache(config.cache.path)
        return {reader.header.teacher["name"]: reader}
    if not config.caches:
        raise ConfigError(
            f"mimic.objective={config.mimic.objective} needs a cache: give cache.path=..., or objective=mae"
        )
    readers = {name: open_cache(entry.path) for name, entry in config.caches.items()}
    first_name, first = next(iter(readers.items()))
    for name, reader in readers.items():
        for what in ("dataset.digest", "preprocessing"):
            there, here = (operator.attrgetter(what)(each.header) for each in (first, reader))
            if there != here:
                raise CacheError(
                    f"caches {first_name} and {name} differ in {what} ({there}, {here}): their teachers did not see "
                    "the same pixels; extract both from the same images, with the same store and libraries"
                )
    return readers


def _views(config: PretrainConfig, caches: dict[str, CacheReader]) -> ViewConfig:
    """The views of the caches, which must agree with each other and with the student's size."""
    policies = [cache.header.view_policy.model_dump() for cache in caches.values()]
    for name, policy in zip(caches, policies, strict=True):
        if policy != policies[0]:
            raise CacheError(
                f"cache {name} holds other views than {next(iter(caches))}: extract both with equal views.*"
            )
    views = ViewConfig.model_validate(policies[0]) if policies else config.views
    if views.image_size != config.student.image_size:
        raise ConfigError(
            f"student.image_size={config.student.image_size}, but the views have {views.image_size} pixels: "
            f"set student.image_size={views.image_size}"
        )
    return views


def _open_source(config: PretrainConfig, caches: dict[str, CacheReader]) -> ImageSource | None:
    first = next(iter(caches.values()), None)
    if config.data.path is None:
        if first is None or not first.stores_images:
            raise ConfigError("'data.path' is missing: give data.path=... (only a webdataset cache holds the images)")
        return None
    source = open_images(config.data.path, config.data.limit)
    here = preprocessing(config.student.image_size, "zarr")
    if first is not None and not first.stores_images and first.header.preprocessing != here:
        log.warning(
            "the cache's views were rendered with %s, this machine has %s: pixels may differ in their last bit",
            first.header.preprocessing,
            here,
        )
    digest = source.digest() if caches else ""
    for name, cache in caches.items():
        if cache.header.dataset.digest != digest:
            raise CacheError(
                f"cache {name} was made of {cache.header.count} images at {cache.header.dataset.source}, not of these "
                f"{len(source)} at {config.data.path}: give the same data.path and data.limit, or extract again"
            )
    return source


def _live(caches: dict[str, CacheReader]) -> NDArray[np.int64]:
    """The samples that every cache holds, ascending."""
    for name, cache in caches.items():
        missing = cache.missing_shards()
        if missing:
            raise CacheError(
                f"cache {name} lacks {len(missing)} of {cache.header.shards} shards: finish its extraction"
            )
    return functools.reduce(np.intersect1d, (cache.live_indices() for cache in caches.values()))


def _build(config: PretrainConfig, caches: dict[str, CacheReader]) -> Student:
    torch.manual_seed(config.seed)
    mimics = config.mimic.objective != "mae"
    student = build_student(
        **config.student.model_dump(exclude_none=True),
        **config.mimic.model_dump(exclude_none=True),
        teachers={name: cache.header.dim for name, cache in caches.items()} if mimics else None,
    )
    for name, cache in caches.items():
        if cache.header.grid != student.grid:
            h, w = cache.header.grid
            raise CacheError(
                f"cache {name} holds a {h}x{w} grid, the student's is {student.grid[0]}x{student.grid[1]}: choose "
                "student.image_size and patch_size, or teacher.image_size in extraction, so that they agree"
            )
        quantiser = cache.header.quantiser
        if mimics and quantiser.name == "int8":
            student.set_channel_stats(name, torch.from_numpy(quantiser.mean), torch.from_numpy(quantiser.std))
    return student


def _focus(config: PretrainConfig, caches: dict[str, CacheReader]) -> Literal["sampled", "top-k", "random"]:
    if not caches:
        return "random"
    first = next(iter(caches.values()))
    if first.header.attention == "none" and config.mask.focus != "random":
        raise ConfigError("this cache's teacher has no attention to focus by: set mask.focus=random")
    return config.mask.focus


def _identity(
    config: PretrainConfig,
    caches: dict[str, CacheReader],
    student: Student,
    views: ViewConfig,
    source: ImageSource | None,
) -> dict[str, Any]:
    """What a resumed run must have in common with the one it goes on from."""
    return {
        "stage": "pretrain",
        "seed": config.seed,
        "batch_size": config.batch_size,
        "order": config.order.model_dump(),
        "mask": config.mask.model_dump(),
        "views": views.model_dump(mode="json"),
        "data": source.digest() if source and not caches else None,  # with caches, their fingerprints know it
        "caches": {name: cache.header.fingerprint for name, cache in caches.items()},
        "student": student.spec,
    }
