"""Stage 2, `mrmae pretrain`: a student learns from images and cached targets; no step runs a teacher.

    mrmae pretrain data.path=/data/imagenet/train cache.path=/data/clip student.name=mrmae_convvit_base_patch16 \
        output=runs/convvit

With objective=mae and no cache it is plain MAE, on views drawn by the same function. With teacher.spec in place of
cache.path the teacher runs in every step, on the same views and with the same masks: what a cache saves.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.assembly.caches import check_records, live_samples, match_images, open_caches, views_of
from pipeline.assembly.extraction import Extractor
from pipeline.assembly.knn_callback import WatchConfig, open_watch
from pipeline.assembly.samples import PretrainBatch, PretrainDataset
from pipeline.assembly.targets import CachedTargets, OnlineTargets, Targets
from pipeline.assembly.teachers import load_teacher, teacher_dtype
from pipeline.cache import CacheReader
from pipeline.config import Config, PathField
from pipeline.data.images import ImageSource, open_images
from pipeline.data.loader import StepSampler, load
from pipeline.data.masks import visible_count
from pipeline.data.order import EpochOrder
from pipeline.data.readable import check_readable
from pipeline.data.views import ViewConfig
from pipeline.errors import CacheError, ConfigError
from pipeline.models import Student, build_student, load_weights, model_record, read_weights
from pipeline.models.student_config import MimicConfig, StudentConfig
from pipeline.ownership import stage
from pipeline.pixels import normalise
from pipeline.processes import processes
from pipeline.teachers import Teacher
from pipeline.teachers.teacher_config import TeacherConfig
from pipeline.training.checkpoint import newest_checkpoint, recorded_start, resolve_checkpoint
from pipeline.training.engine import fit
from pipeline.training.grad_norms import GradNorms
from pipeline.training.optim import OptimConfig
from pipeline.training.run import Run, RunConfig, StepPlan
from pipeline.weights import state_digest

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

    @model_validator(mode="after")
    def _several_differ(self) -> "MaskConfig":
        if self.focus == "top-k" and self.masks_per_sample > 1:
            raise ValueError("focus=top-k knows one mask a sample: use focus=sampled, or masks_per_sample=1")
        return self


class OrderConfig(Config):
    """In which order an epoch visits its samples."""

    kind: Literal["full", "block"] = "full"  # block: shuffle inside windows of shards, for disks that hate random reads
    window: int = Field(16, ge=1)  # shards


class PretrainConfig(RunConfig):
    """Everything `pretrain` takes."""

    data: PretrainData = PretrainData()
    cache: CacheInput | None = None
    caches: dict[str, CacheInput] = Field(default_factory=dict)  # several teachers: a name and a cache each
    teacher: TeacherConfig | None = None  # in place of a cache: run it in every step
    teachers: dict[str, TeacherConfig] = Field(default_factory=dict)  # several of them
    views: ViewConfig = ViewConfig()  # without a cache; a cache brings its own
    student: StudentConfig = StudentConfig()
    mimic: MimicConfig = MimicConfig()
    mask: MaskConfig = MaskConfig()
    order: OrderConfig = OrderConfig()
    optim: OptimConfig = OptimConfig()
    init: PathField | None = None  # start from these weights: a run, a checkpoint or a public file
    knn: WatchConfig | None = None  # classify by nearest neighbours every few epochs; the best checkpoint is kept
    check_records: int = Field(32, ge=0)  # random records held against the live images before the first step
    grad_norms_every: int = Field(500, ge=0)  # steps between measurements of each loss's pull; 0: never

    @model_validator(mode="after")
    def _one_way_to_name_teachers(self) -> "PretrainConfig":
        if sum(map(bool, (self.cache, self.caches, self.teacher, self.teachers))) > 1:
            raise ValueError("give one of cache.path, caches.NAME.path, teacher.spec and teachers.NAME.spec")
        return self


@dataclass(frozen=True)
class _Knowledge:
    """What there is to mimic: caches, or live teachers, or, for plain MAE, nothing."""

    caches: dict[str, CacheReader] = field(default_factory=dict)
    teachers: dict[str, Teacher] = field(default_factory=dict)

    @property
    def dims(self) -> dict[str, int]:
        """Channels of each teacher's tokens."""
        cached = {name: cache.header.dim for name, cache in self.caches.items()}
        return cached | {name: teacher.dim for name, teacher in self.teachers.items()}

    @property
    def grids(self) -> dict[str, tuple[int, int]]:
        cached = {name: cache.header.grid for name, cache in self.caches.items()}
        return cached | {name: teacher.grid for name, teacher in self.teachers.items()}

    @property
    def has_attention(self) -> bool:
        """Whether the first teacher has something to focus by."""
        if self.caches:
            return next(iter(self.caches.values())).header.attention != "none"
        return any(teacher.has_attention for teacher in list(self.teachers.values())[:1])

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it goes on from."""
        fingerprints = {"caches": {name: cache.header.fingerprint for name, cache in self.caches.items()}}
        live = {name: teacher.identity() for name, teacher in self.teachers.items()}
        return fingerprints | ({"teachers": live} if live else {})


@stage
def run(config: PretrainConfig) -> dict[str, Any]:
    """Train to the end, or to the next interruption; returns the last metrics."""
    known = _open_knowledge(config)
    views = _views(config, known)
    source = _open_source(config, known)
    live = live_samples(known.caches) if known.caches else np.arange(len(source or ()), dtype=np.int64)
    student = _build(config, known)
    if config.mimic.objective != "mae":
        _give_statistics(config, student, known, source)
    identity = _identity(config, known, student, views, source, live)
    run = Run(config, identity | {"init": _start_from(config, student)}, may_change=("samples",))
    if known.caches and config.check_records and run.is_main:
        log.info("checked %s", check_records(known.caches, source, live, config.seed, config.check_records))
    plan = StepPlan.of(len(live), config, run.processes, per_image=config.mask.masks_per_sample)
    dataset = _dataset(config, known, views, source, student)
    block = next(iter(known.caches.values())).header.samples_per_shard if known.caches else 1024
    order = EpochOrder(live, config.seed, config.order.kind, block, config.order.window)

    def batches(start_step: int) -> Iterator[PretrainBatch]:
        images = plan.batch_size // config.mask.masks_per_sample
        sampler = StepSampler(order, images, plan.accum_iter, run.rank, run.processes, start_step, plan.total_steps)
        return load(dataset, sampler, config.data.workers)

    watch, watch_every = None, 0
    if config.knn:
        watch = open_watch(config.knn, config.student.image_size, run.rank, run.processes, run.device)
        watch_every = max(1, round(config.knn.every * plan.steps_per_epoch))
    return fit(
        run,
        student,
        model_record(student),
        _Losses(_targets(config, known, dataset)),
        batches,
        plan,
        config.optim,
        evaluate=watch,
        evaluate_every=watch_every,
        best="knn_top1" if watch else None,
        grad_norms=GradNorms(("mimic_loss", "pixel_loss"), list(student.encoder.parameters()), config.grad_norms_every),
        label="pretrain",
    )


class _Losses:
    """A micro-batch → the student's losses: targets found and pixels normalised on the device."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets

    def __call__(self, student: nn.Module, batch: PretrainBatch) -> dict[str, Tensor]:
        ids_keep, targets = self._targets(batch)
        losses: dict[str, Tensor] = student(normalise(batch.images), ids_keep, targets)
        return losses


def _open_knowledge(config: PretrainConfig) -> _Knowledge:
    if config.cache or config.caches:
        paths = {"": config.cache.path} if config.cache else {name: c.path for name, c in config.caches.items()}
        return _Knowledge(caches=open_caches(paths))
    if config.teacher or config.teachers:
        device = processes().device
        dtype = teacher_dtype(config.precision, device)
        live = [load_teacher(each, device, dtype) for each in [config.teacher, *config.teachers.values()] if each]
        teachers = dict(zip(config.teachers or [live[0].name], live, strict=True))
        _recall_digests(config, teachers)
        return _Knowledge(teachers=teachers)
    if config.mimic.objective != "mae":
        raise ConfigError(
            f"mimic.objective={config.mimic.objective} needs a cache: give cache.path=..., or objective=mae, or "
            "teacher.spec=... to run a teacher in every step"
        )
    return _Knowledge()


def _recall_digests(config: PretrainConfig, teachers: Mapping[str, Teacher]) -> None:
    """A run of before knows its live teachers by the digest of resampled weights, and goes on with them."""
    if any(teacher.backbone.native for teacher in teachers.values()):
        newest = newest_checkpoint(config.output / "checkpoints")
        recorded = newest.identity.get("teachers", {}) if newest else {}
        for name in teachers.keys() & recorded.keys():
            teachers[name].recognises(recorded[name]["weights_sha256"])


def _views(config: PretrainConfig, known: _Knowledge) -> ViewConfig:
    """The views of the caches, or those of the config; they must have the student's size."""
    views = views_of(known.caches) if known.caches else config.views
    if views.image_size != config.student.image_size:
        raise ConfigError(
            f"student.image_size={config.student.image_size}, but the views have {views.image_size} pixels: "
            f"set student.image_size={views.image_size}"
        )
    return views


def _open_source(config: PretrainConfig, known: _Knowledge) -> ImageSource | None:
    if config.data.path is None:
        if not any(cache.stores_images for cache in list(known.caches.values())[:1]):
            raise ConfigError("'data.path' is missing: give data.path=... (only a webdataset cache holds the images)")
        if config.data.limit is not None:
            raise ConfigError("data.limit chooses among the images of data.path, and there is none: leave it out")
        return None
    source = open_images(config.data.path, config.data.limit)
    if known.caches:
        match_images(known.caches, source)
    else:
        check_readable(source)  # a cache knows which images can't be read, and leaves them out
    return source


def _build(config: PretrainConfig, known: _Knowledge) -> Student:
    torch.manual_seed(config.seed)
    student = build_student(
        **config.student.model_dump(exclude_none=True),
        **config.mimic.model_dump(exclude_none=True),
        teachers=known.dims if config.mimic.objective != "mae" else None,
    )
    for name, (h, w) in known.grids.items():
        if (h, w) != student.grid:
            raise CacheError(
                f"{'cache' if known.caches else 'teacher'} {name} has a {h}x{w} grid, the student's is "
                f"{student.grid[0]}x{student.grid[1]}: choose student.image_size and patch_size, or the teacher's "
                "image_size, so that they agree"
            )
    return student


def _start_from(config: PretrainConfig, student: Student) -> str | None:
    """Load `init`, if there is one, and say what it is by its bytes; a run that goes on has recorded that."""
    if config.init is None:
        return None
    recorded = recorded_start(config.output, config.init)
    if recorded:
        return recorded.identity
    state, _ = read_weights(resolve_checkpoint(config.init))
    load_weights(student, state, strict=False)
    return state_digest(state)


def _give_statistics(config: PretrainConfig, student: Student, known: _Knowledge, source: ImageSource | None) -> None:
    """The channel statistics of the targets: a cache's own, or those of a live teacher on the first images."""
    quantisers = {name: cache.header.quantiser for name, cache in known.caches.items()}
    if known.teachers and config.mimic.target_norm != "layernorm":
        assert source is not None
        teachers = list(known.teachers.values())
        extractor = Extractor(source, config.views, teachers, 64, config.data.workers, store="zarr")
        quantisers = dict(zip(known.teachers, extractor.calibrate("int8", 256), strict=True))
    for name, quantiser in quantisers.items():
        if quantiser.name == "int8":
            student.set_channel_stats(name, torch.from_numpy(quantiser.mean), torch.from_numpy(quantiser.std))


def _dataset(
    config: PretrainConfig, known: _Knowledge, views: ViewConfig, source: ImageSource | None, student: Student
) -> PretrainDataset:
    if not known.has_attention and config.mask.focus != "random" and known.dims:
        raise ConfigError("the first teacher has no attention to focus by: set mask.focus=random")
    patches = student.grid[0] * student.grid[1]
    return PretrainDataset(
        source,
        known.caches,
        views,
        patches=patches,
        keep=visible_count(patches, config.mask.mask_ratio),
        focus=config.mask.focus if known.dims else "random",
        rows=student.target_rows,
        masks_per_sample=config.mask.masks_per_sample,
        seed=config.seed,
        online=bool(known.teachers),
    )


def _targets(config: PretrainConfig, known: _Knowledge, dataset: PretrainDataset) -> Targets:
    if known.teachers:
        return OnlineTargets(known.teachers, dataset.keep, dataset.rows, config.mask.masks_per_sample)
    return CachedTargets({name: cache.header.quantiser.dequantise for name, cache in known.caches.items()})


def _identity(
    config: PretrainConfig,
    known: _Knowledge,
    student: Student,
    views: ViewConfig,
    source: ImageSource | None,
    live: NDArray[np.int64],
) -> dict[str, Any]:
    """What a resumed run must have in common with the one it goes on from."""
    return known.identity() | {
        "stage": "pretrain",
        "seed": config.seed,
        "batch_size": config.batch_size,
        "order": config.order.model_dump(),
        "mask": config.mask.model_dump(),
        "views": views.model_dump(mode="json"),
        "data": source.digest() if source and not known.caches else None,  # with caches, their fingerprints know it
        "student": student.spec,
        "teachers_in_order": list(known.dims),  # the first one's attention is the focus
        # Repairing a cache may bring samples back, and then every epoch has another order.
        "samples": f"{len(live)} ({xxhash.xxh3_64_hexdigest(live.tobytes())})",
    }
