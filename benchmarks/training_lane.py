"""A student in training as a lane of a benchmark: plain MAE, MR-MAE from a cache, MR-MAE with a live teacher."""

import time

import numpy as np
import torch
from pydantic import Field

from benchmarks.harness import Bench, count_gmacs
from pipeline.assembly.samples import PretrainBatch, PretrainDataset
from pipeline.assembly.targets import CachedTargets, OnlineTargets, Targets
from pipeline.cache import CacheReader
from pipeline.config import Config
from pipeline.data.images import ImageSource
from pipeline.data.loader import StepSampler, load
from pipeline.data.masks import visible_count
from pipeline.data.order import EpochOrder
from pipeline.data.views import ViewConfig
from pipeline.models import Student, build_student
from pipeline.models.student_config import StudentConfig
from pipeline.pixels import normalise
from pipeline.teachers import Teacher
from pipeline.training.optim import OptimConfig, build_adamw, parameter_groups

_FOREVER = 2**40  # steps


class LaneConfig(Config):
    """What all lanes of a comparison have in common."""

    student: StudentConfig = StudentConfig(name="mrmae_vit_tiny_patch16")
    batch_size: int = Field(32, ge=2)
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    compile: bool = False  # torch.compile students and teachers
    workers: int = Field(0, ge=0)  # decoding processes a lane; 0 puts a lane's loading into its own time
    steps: int = Field(1, ge=1)  # of each lane in a round
    seed: int = 0


class TrainingLane:
    """A student with its batches and its optimiser; each method does `config.steps` steps' worth of its job.

    Args:
        cache, teacher: what is mimicked, one of the two; plain MAE without either.
    """

    def __init__(
        self,
        config: LaneConfig,
        source: ImageSource,
        bench: Bench,
        *,
        cache: CacheReader | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.bench, self.steps = bench, config.steps
        caches = {} if cache is None else {"teacher": cache}
        teachers = {} if teacher is None else {"teacher": teacher}
        dims = {name: cache.header.dim for name, cache in caches.items()}
        dims |= {name: teacher.dim for name, teacher in teachers.items()}
        torch.manual_seed(config.seed)
        self.student = build_student(
            **config.student.model_dump(exclude_none=True),
            objective="mr_mae" if dims else "mae",
            teachers=dims or None,
        )
        self.dataset, self._targets = _dataset_and_targets(config, source, self.student, caches, teachers)
        self._batches = load(self.dataset, requests(config, source), config.workers)
        if config.compile:
            self.student.compile()
        self.student.to(bench.device)
        optim = OptimConfig(lr=1e-4)
        self._optimizer = build_adamw(parameter_groups(self.student, optim.weight_decay), optim)
        self.waits: list[float] = []  # seconds that each call of `train` waited for its batches
        self.batch: PretrainBatch = next(self._batches).to(bench.device)

    def train(self) -> None:
        """Load and train, as a run does both: a batch is copied ahead of its step."""
        waited = 0.0
        for _ in range(self.steps):
            began = time.perf_counter()
            batch, self.batch = self.batch, next(self._batches).to(self.bench.device)
            waited += time.perf_counter() - began
            self._step(batch)
        self.waits.append(waited)

    def step_again(self) -> None:
        """Train alone, on the batch that is there."""
        for _ in range(self.steps):
            self._step(self.batch)

    def load(self) -> None:
        """Load alone."""
        for _ in range(self.steps):
            next(self._batches).to(self.bench.device)

    def gmacs_per_image(self) -> float:
        """Multiply-adds of a forward and a backward, in billions, without the teacher."""
        ids_keep, targets = self._targets(self.batch)

        def forward_backward() -> None:
            self.student(normalise(self.batch.images), ids_keep, targets)["loss"].backward()

        with torch.compiler.set_stance("force_eager"):
            gmacs = count_gmacs(forward_backward)
        self._optimizer.zero_grad(set_to_none=True)
        return gmacs / len(self.batch.images)

    def peak_memory(self) -> int:
        """Bytes at a step's peak on CUDA, what the other lanes hold left out."""
        moments = [value for state in self._optimizer.state.values() for value in state.values()]
        weights = [*self.student.parameters(), *self.student.buffers()]
        held: int = sum(value.numel() * value.element_size() for value in [*weights, *moments])
        before = torch.cuda.memory_allocated(self.bench.device)
        torch.cuda.reset_peak_memory_stats(self.bench.device)
        self.step_again()
        return int(torch.cuda.max_memory_allocated(self.bench.device)) - before + held

    def _step(self, batch: PretrainBatch) -> None:
        ids_keep, targets = self._targets(batch)
        with self.bench.autocast():
            losses = self.student(normalise(batch.images), ids_keep, targets)
        losses["loss"].backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def requests(config: LaneConfig, source: ImageSource) -> StepSampler:
    """The requests of a run in one process that never ends."""
    order = EpochOrder(np.arange(len(source)), config.seed, "full", 64, 16)
    return StepSampler(order, config.batch_size, 1, 0, 1, 0, _FOREVER)


def _dataset_and_targets(
    config: LaneConfig,
    source: ImageSource,
    student: Student,
    caches: dict[str, CacheReader],
    teachers: dict[str, Teacher],
) -> tuple[PretrainDataset, Targets]:
    """What the loader makes of an image, and what the student mimics in a step."""
    patches = student.grid[0] * student.grid[1]
    dataset = PretrainDataset(
        None if any(cache.stores_images for cache in caches.values()) else source,
        caches,
        ViewConfig(image_size=config.student.image_size),
        patches=patches,
        keep=visible_count(patches, config.mask_ratio),
        focus="sampled" if caches or teachers else "random",
        rows=student.target_rows,
        masks_per_sample=1,
        seed=config.seed,
        online=bool(teachers),
    )
    if teachers:
        return dataset, OnlineTargets(teachers, dataset.keep, student.target_rows, 1)
    return dataset, CachedTargets({name: cache.header.quantiser.dequantise for name, cache in caches.items()})
