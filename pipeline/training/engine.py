"""The training loop of every stage: a model, a function that turns a batch into losses, and batches by step.

Learning rate and random numbers are functions of the step, and batches start at any step, so the state of a run is
the model, the optimiser and one integer. Nothing is replayed on resume.
"""

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import TrainingError
from pipeline.progress import Progress
from pipeline.training.checkpoint import Checkpoint, load_checkpoint, prune, save_checkpoint
from pipeline.training.ema import EmaConfig, build_ema
from pipeline.training.grad_norms import GradNorms
from pipeline.training.interruption import Interrupted, Interruption
from pipeline.training.metrics import LossMeter, MetricsWriter, Stopwatch, peak_memory
from pipeline.training.optim import CosineSchedule, OptimConfig, build_adamw, parameter_groups, set_lr
from pipeline.training.run import Run, StepPlan

log = logging.getLogger(__name__)


class Movable(Protocol):
    """A micro-batch: it knows how to copy itself to a device."""

    def to(self, device: torch.device) -> Any: ...


B = TypeVar("B", bound=Movable)
Losses = Callable[[nn.Module, B], dict[str, Tensor]]  # scalars; "loss" is the one that is minimised


def fit(
    run: Run,
    model: nn.Module,
    spec: Mapping[str, Any],
    losses: Losses[B],
    batches: Callable[[int], Iterable[B]],
    plan: StepPlan,
    optim: OptimConfig,
    *,
    layer_ids: Mapping[str, int] | None = None,
    evaluate: Callable[[nn.Module, int], dict[str, float]] | None = None,
    evaluate_every: int = 0,
    best: str | None = None,
    ema: EmaConfig | None = None,
    grad_norms: GradNorms | None = None,
    label: str = "train",
) -> dict[str, Any]:
    """Train until `plan.total_steps`; returns the last logged metrics.

    Args:
        run: processes, folder and the checkpoint to go on from.
        model: trained in place; left on the run's device.
        spec: JSON-able description that rebuilds the model, kept in each checkpoint.
        losses: (model, micro-batch) → dict of scalars with "loss".
        batches: start step → micro-batches of this process, `plan.accum_iter` of them for each step.
        evaluate: (unwrapped model, step) → metrics; every `evaluate_every` steps and at the end.
        best: the evaluation metric whose highest value is kept as checkpoints/best.
        ema: average the weights; the average is then what is evaluated, and what checkpoints show their readers.
        grad_norms: measures, now and then, how hard each loss pulls.

    Raises:
        TrainingError: the loss is not finite, or the run to go on with is longer than this one.
        Interrupted: a signal came; a checkpoint was saved.
    """
    if run.start_step > plan.total_steps:
        raise TrainingError(
            f"output={run.folder} holds a run of {run.start_step} steps, this one would have {plan.total_steps}: "
            "choose another output, or more epochs or max_steps"
        )
    loop = _Loop(run, model, spec, plan, optim, layer_ids, best, ema or EmaConfig(), grad_norms)
    batches_of_run = iter(_ahead(batches(run.start_step), run.device))
    with Interruption() as interruption, loop.progress(label):
        for step in range(run.start_step, plan.total_steps):
            loop.train_step(step, batches_of_run, losses)
            done = step + 1
            last = done == plan.total_steps
            if done % run.config.log_every == 0 or last or done == 1:
                loop.log(done)
            look = evaluate is not None and (last or bool(evaluate_every and done % evaluate_every == 0))
            stop = loop.any_process(interruption.requested)
            # Before an evaluation, which may take longer than the grace that a stopped job is given.
            if done % run.config.checkpoint_every == 0 or last or stop or look:
                loop.save(done)
            if stop and not last:
                loop.close()
                raise Interrupted(f"stopped at step {done} of {plan.total_steps} with a checkpoint; run again to go on")
            if evaluate and look:
                loop.evaluate(done, evaluate)
                if last:
                    loop.save(done)  # once more, with what it found
    loop.close()
    return loop.latest


class _Loop:
    """The state of one `fit`, and what happens in a step, in a log row and in a checkpoint."""

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        spec: Mapping[str, Any],
        plan: StepPlan,
        optim: OptimConfig,
        layer_ids: Mapping[str, int] | None,
        best: str | None,
        ema: EmaConfig,
        grad_norms: GradNorms | None,
    ) -> None:
        self.run, self.spec, self.plan, self.optim, self.best = run, spec, plan, optim, best
        self.plain_model = model
        groups = parameter_groups(model, optim.weight_decay, layer_ids, optim.layer_decay)
        self.plain_optimizer = build_adamw(groups, optim)
        self.ema = build_ema(model.to(run.device), ema)
        self.result = self.ema.module if self.ema else model  # what is evaluated, and read from checkpoints
        if run.resumed:
            restore(run.resumed, model, self.plain_optimizer, self.result)
        if run.config.compile:
            model.compile()  # in place: names in checkpoints stay
        self.model, self.optimizer = run.accelerator.prepare(model, self.plain_optimizer)
        self.schedule = CosineSchedule(
            optim.peak_lr(plan.batch_size),
            optim.min_lr,
            min(round(optim.warmup_epochs * plan.steps_per_epoch), plan.total_steps // 2),
            plan.total_steps,
        )
        self.meter = LossMeter(run.device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=run.device)
        self.writer = MetricsWriter(run.folder / "metrics.jsonl", run.start_step) if run.is_main else None
        self.latest: dict[str, Any] = dict(run.resumed.metrics) if run.resumed else {}
        self.best_value = self._former_best()
        self.grad_norms = grad_norms
        self.norms: dict[str, Tensor] = {}
        self.watch = Stopwatch()

    def train_step(self, step: int, batches: Iterator[B], losses: Losses[B]) -> None:
        self.model.train()
        set_lr(self.plain_optimizer, self.schedule(step))
        for micro in range(self.plan.accum_iter):
            batch = self._next(batches)
            if self.grad_norms and micro == 0 and self.grad_norms.due(step):
                self.norms |= self._single_losses(self.grad_norms, step, batch, losses)
            # Only now: starting the loader draws from the global generators too, after a resume and not before.
            self._seed(step, micro)
            if micro + 1 < self.plan.accum_iter:
                with self.run.accelerator.no_sync(self.model):
                    self._backward(step, batch, losses)
            else:
                self._backward(step, batch, losses)
        self._clip(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.plain_model, step + 1)
        self.meter.steps += 1
        self.bar.advance(1)

    def _backward(self, step: int, batch: B, losses: Losses[B]) -> None:
        values = losses(self.model, batch)
        loss = values["loss"]
        self.run.accelerator.backward(loss / self.plan.accum_iter)
        self.meter.add(values)
        # Remember the first bad step on the device: asking the host every step would stall it.
        bad = ~torch.isfinite(loss.detach()) & (self.first_bad < 0)
        self.first_bad = torch.where(bad, step, self.first_bad)

    def _next(self, batches: Iterator[B]) -> B:
        began = time.perf_counter()
        batch = next(batches)
        self.watch.waited += time.perf_counter() - began
        return batch

    def _single_losses(self, grad_norms: GradNorms, step: int, batch: B, losses: Losses[B]) -> dict[str, Tensor]:
        """By the model itself, not by DDP's wrapper of it, which would count the extra passes as a step's."""

        def run() -> dict[str, Tensor]:
            self._seed(step, 0)
            # Eager: compiled under another context than the step's, it would be compiled for the step once more.
            with torch.compiler.set_stance("force_eager"), self.run.accelerator.autocast():
                return losses(self.plain_model, batch)

        began = time.perf_counter()
        norms = grad_norms.measure(run)
        self.watch.leave_out(time.perf_counter() - began)
        return norms

    def _clip(self, step: int) -> None:
        limit = self.optim.clip_grad
        logged = (step + 1) % self.run.config.log_every == 0 or step == 0 or step + 1 == self.plan.total_steps
        if limit is not None or logged:
            norm = self.run.accelerator.clip_grad_norm_(self.model.parameters(), limit or float("inf"))
            self.norms["grad_norm"] = norm.detach()

    def _seed(self, step: int, micro: int) -> None:
        """Dropout, drop-path, mixup and erasing depend on (seed, step, micro-batch, rank) alone."""
        words = np.random.SeedSequence([self.run.config.seed, step, micro, self.run.rank]).generate_state(3)
        torch.manual_seed(int(words[0]))
        np.random.seed(int(words[1]))  # timm's mixup draws from numpy's global state,
        random.seed(int(words[2]))  # its erasing from Python's

    def log(self, done: int) -> None:
        self._check_finite(done)
        steps = max(1, self.meter.steps) * self.plan.accum_iter
        elapsed, wait = self.watch.elapsed, self.watch.wait_share
        images = max(1, self.meter.steps) * self.plan.batch_size
        sums = self.meter.take()
        means = {name: float(self.run.accelerator.reduce(total / steps, "mean")) for name, total in sums.items()}
        row: dict[str, Any] = {"epoch": done / self.plan.steps_per_epoch, **means}
        row |= {"lr": self.schedule(done - 1), "images_per_s": images / elapsed, "data_wait": wait}
        norms, self.norms = self.norms, {}
        row |= {name: float(self.run.accelerator.reduce(norm, "mean")) for name, norm in norms.items()}
        row["memory_gib"] = peak_memory(self.run.device) / 2**30
        self._write(done, row)
        note = f"{means['loss']:.4f}"
        self.bar.advance(0, loss=note, img_s=f"{row['images_per_s']:.0f}", wait=f"{wait:.0%}")
        self.watch.reset()

    def evaluate(self, done: int, evaluate: Callable[[nn.Module, int], dict[str, float]]) -> None:
        began = time.perf_counter()
        self._check_finite(done, weights=True)  # nothing else may become the best
        self.result.eval()
        # Not inference mode: tensors born in it, as a moved model's buffers, could take no part in training.
        with torch.no_grad(), self.run.accelerator.autocast():
            values = evaluate(self.result, done)
        self._write(done, values)
        if self.best and values.get(self.best, float("-inf")) > self.best_value:
            self.best_value = values[self.best]
            self._save("best", done, with_optimizer=False)
        self.watch.leave_out(time.perf_counter() - began)

    def save(self, done: int) -> None:
        began = time.perf_counter()
        self._check_finite(done, weights=True)
        name = f"step-{done:08d}"
        self._save(name, done, with_optimizer=True)
        if self.run.is_main:
            prune(self.run.checkpoints, self.run.config.keep_checkpoints, name)
        self.run.accelerator.wait_for_everyone()
        self.watch.leave_out(time.perf_counter() - began)

    def _save(self, name: str, done: int, with_optimizer: bool) -> None:
        if self.run.is_main:
            save_checkpoint(
                self.run.checkpoints / name,
                self.result,
                self.spec,
                step=done,
                identity=self.run.identity,
                metrics=self.latest,
                optimizer_state=self.plain_optimizer.state_dict() if with_optimizer else None,
                trained=self.plain_model if self.ema and with_optimizer else None,
            )

    def any_process(self, flag: bool) -> bool:
        """True everywhere as soon as one process says so: all must leave at the same step."""
        if self.run.processes == 1:
            return flag
        return bool(self.run.accelerator.reduce(torch.tensor(int(flag), device=self.run.device), "sum"))

    def progress(self, label: str) -> Progress:
        self.bar = Progress(self.plan.total_steps, label, "step", done=self.run.start_step, show=self.run.is_main)
        return self.bar

    def close(self) -> None:
        if self.run.accelerator.trackers:
            self.run.accelerator.end_training()

    def _write(self, done: int, row: dict[str, Any]) -> None:
        self.latest |= row
        if self.writer:
            self.writer.write(done, row)
        if self.run.accelerator.trackers:
            self.run.accelerator.log(row, step=done)

    def _check_finite(self, done: int, weights: bool = False) -> None:
        """Every process leaves if one of them met a bad loss; with `weights`, also if an update spoiled the model."""
        bad = int(self.first_bad)
        if weights and bad < 0 and not all(bool(p.isfinite().all()) for p in self.plain_model.parameters()):
            bad = done - 1
        if self.any_process(bad >= 0):
            bad = bad if bad >= 0 else done - 1  # another process knows it better
            good = max(self.run.checkpoints.glob("step-*"), default="none yet")
            raise TrainingError(
                f"the loss became non-finite at step {bad} (lr {self.schedule(bad):.3g}); last checkpoint: {good}; "
                "lower optim.blr, set optim.clip_grad=1, or use precision=bf16 or fp32"
            )

    def _former_best(self) -> float:
        if not self.best or not self.run.resumed or not (self.run.checkpoints / "best").is_dir():
            return float("-inf")
        return float(load_checkpoint(self.run.checkpoints / "best").metrics.get(self.best, float("-inf")))


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, result: nn.Module | None = None
) -> None:
    """Load weights, optimiser state and, where `result` is another than `model`, its average: exactly."""
    from safetensors.torch import load_file

    averaged = result is not None and result is not model
    model.load_state_dict(
        load_file(checkpoint.path / ("trained.safetensors" if averaged else "model.safetensors")), strict=True
    )
    if result is not None and averaged:
        result.load_state_dict(load_file(checkpoint.path / "model.safetensors"), strict=True)
    optimizer.load_state_dict(checkpoint.optimizer_state())
    log.info("resumed from %s", checkpoint.path)


def _ahead(batches: Iterable[B], device: torch.device) -> Iterator[B]:
    """Copy each batch while the one before it is being trained on: on CUDA, by a stream of its own."""
    waiting: tuple[B, Callable[[], None]] | None = None
    start = _copier(device)
    for batch in batches:
        moved = start(batch)
        if waiting is not None:
            waiting[1]()
            yield waiting[0]
        waiting = moved
    if waiting is not None:
        waiting[1]()
        yield waiting[0]


def _copier(device: torch.device) -> Callable[[B], tuple[B, Callable[[], None]]]:
    """batch → (its copy on the device, what lets the training stream wait for it)."""
    if device.type != "cuda":
        return lambda batch: (batch.to(device), lambda: None)
    stream, training = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def start(batch: B) -> tuple[B, Callable[[], None]]:
        # The room of the last batch but one is free for this copy when the steps launched so far are done.
        stream.wait_stream(training)
        with torch.cuda.stream(stream):
            moved = batch.to(device)
            arrived = stream.record_event()
        return moved, lambda: training.wait_event(arrived)

    return start
