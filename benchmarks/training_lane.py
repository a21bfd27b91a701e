"""A student in training as a lane of a benchmark: plain MAE, MR-MAE from a cache, MR-MAE with a live teacher."""

import time
from collections.abc import Generator

import torch

from benchmarks.configs.pretrain import LaneConfig
from benchmarks.harness import Bench, count_gmacs
from pipeline.assembly.knowledge import Knowledge
from pipeline.assembly.samples import PretrainBatch
from pipeline.configs.data import Focus
from pipeline.configs.training import OptimConfig
from pipeline.data.loader import Samples
from pipeline.data.masks import MaskSampler, predicted_count, visible_count
from pipeline.data.order import EpochOrder
from pipeline.models import build_student
from pipeline.pixels import normalise
from pipeline.steps import StepPlan
from pipeline.training.optim import build_adamw, parameter_groups

_FOREVER = 2**40  # steps


class TrainingLane:
    """A student, its batches and its optimiser; `train`, `step_again` and `load` do `config.steps` steps of their job.

    Args:
        knowledge: what is mimicked; plain MAE where it has no teacher.
    """

    def __init__(self, config: LaneConfig, knowledge: Knowledge, bench: Bench) -> None:
        self.config, self.bench, self._knowledge = config, bench, knowledge
        torch.manual_seed(config.seed)
        self.student = build_student(
            **config.student.model_dump(exclude_none=True),
            objective="mr_mae" if knowledge.dims else "mae",
            teachers=knowledge.dims or None,
        )
        patches = self.student.grid[0] * self.student.grid[1]
        focus: Focus = "sampled" if knowledge.dims else "random"
        keep = visible_count(patches, config.mask_ratio)
        predict = predicted_count(patches, keep, self.student.predict_share)
        masks = MaskSampler(patches, keep, focus, config.seed, predict=predict)
        self._dataset = knowledge.dataset(masks, self.student.target_rows)
        self._targets = knowledge.targets(self._dataset)
        self._batches = self.batches(config.workers)
        if config.compile:
            self.student.compile()
        self.student.to(bench.device)
        optim = OptimConfig(lr=1e-4)
        self._optimizer = build_adamw(parameter_groups(self.student, optim.weight_decay), optim)
        self.waits: list[float] = []  # seconds that each call of `train` waited for its batches
        self.batch = next(self._batches).to(bench.device)

    def batches(self, workers: int) -> Generator[PretrainBatch, None, None]:
        """The batches of a run that never ends."""
        order = EpochOrder(self._knowledge.samples, self.config.seed, "full", 64, 16)
        plan = StepPlan(len(order) // self.config.batch_size, _FOREVER, self.config.batch_size, 1, 1)
        return Samples(self._dataset, order, workers).batches(plan, 0)

    def train(self) -> None:
        """Load and train, as a run does both: a batch is copied ahead of its step."""
        waited = 0.0
        for _ in range(self.config.steps):
            began = time.perf_counter()
            batch, self.batch = self.batch, next(self._batches).to(self.bench.device)
            waited += time.perf_counter() - began
            self._step(batch)
        self.waits.append(waited)

    def step_again(self) -> None:
        """Train alone, on the batch that is there."""
        for _ in range(self.config.steps):
            self._step(self.batch)

    def load(self) -> None:
        """Load alone."""
        for _ in range(self.config.steps):
            next(self._batches).to(self.bench.device)

    def gmacs_per_image(self) -> float:
        """Multiply-adds of a forward and a backward, in billions, without the teacher."""
        shown = self._targets(self.batch)

        def forward_backward() -> None:
            self.student(normalise(self.batch.images), *shown)["loss"].backward()

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
        with self.bench.autocast():
            losses = self.student(normalise(batch.images), *self._targets(batch))
        losses["loss"].backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
