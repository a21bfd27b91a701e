"""The training loop of every stage.

Learning rate and random numbers are functions of the step, and batches start at any step, so the state of a run is
the model, the optimiser and one integer, and, for the next row of metrics, the sums since the last one. Nothing is
replayed on resume.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic

import torch
from accelerate.utils import broadcast
from torch import Tensor

from pipeline.configs.training import OptimConfig
from pipeline.errors import TrainingError
from pipeline.progress import Progress
from pipeline.steps import StepPlan
from pipeline.training.ahead import ahead
from pipeline.training.batch_norms import average_statistics
from pipeline.training.checkpoint import (
    Checkpoint,
    best_checkpoint,
    make_best,
    prune,
    restore_optimizer,
    restore_weights,
    retire_best,
    save_checkpoint,
)
from pipeline.training.device import float32_products_of, generators_of, peak_of, seed_generators
from pipeline.training.ema import build_ema
from pipeline.training.flops import count_flops
from pipeline.training.garbage import FixedCollection
from pipeline.training.grad_norms import GradNorms
from pipeline.training.interruption import Interrupted, Interruption
from pipeline.training.journal import Pace
from pipeline.training.metrics import Meter, MetricsWriter, Stopwatch, peak_memory
from pipeline.training.optim import build_adamw, cosine_schedule, describe_rate, parameter_groups, set_lr
from pipeline.training.run import Run
from pipeline.training.sharding import blank_copy, fill, gathered, scattered, shard, share, whole
from pipeline.training.task import B, Evaluation, Task
from pipeline.training.telling import tell_end, tell_start

log = logging.getLogger(__name__)

_STOPPING = "stopping after this step, then writing a checkpoint; ctrl-C again ends the run at once, without one"


def fit(task: Task[B], run: Run, plan: StepPlan, optim: OptimConfig) -> dict[str, Any]:
    """Train until `plan.total_steps`; returns the last logged metrics.

    Args:
        run: processes, folder and the checkpoint to go on from.

    Raises:
        TrainingError: the loss is not finite, or the run to go on with is longer than this one.
        Interrupted: a signal came; a checkpoint was saved.
    """
    if run.start_step > plan.total_steps:
        raise TrainingError(
            f"output={run.folder} holds a run of {run.start_step} steps, this one would have {plan.total_steps}: "
            "choose another output, or more epochs or max_steps"
        )
    loop = _Loop(task, run, plan, optim)
    batches = ahead(task.samples.batches(plan, run.start_step), run.device)
    evaluation = task.evaluation

    def due(every: int, done: int) -> bool:
        return done == plan.total_steps or bool(every and done % every == 0)

    interruption = Interruption(_STOPPING if run.is_main else "")
    with run, interruption, loop.garbage, float32_products_of(run), loop.progress():
        tell_start(run, task, plan, describe_rate(optim, plan.batch_size, loop.schedule))
        if evaluation and run.resumed and due(evaluation.every, run.start_step):
            loop.catch_up(evaluation)
        for step in range(run.start_step, plan.total_steps):
            loop.train_step(step, batches)
            done = step + 1
            loop.garbage.step(done)
            if run.is_main and (line := loop.pace.line(done, loop.latest)):
                run.say(line, on_screen=not loop.bar.shown)
            stop = interruption.agreed()
            evaluate = evaluation is not None and due(evaluation.every, done)
            if due(run.config.log_every, done) or done == 1:
                loop.log(done)
            # Before an evaluation, which may take longer than the grace that a stopped job is given.
            if due(run.config.checkpoint_every, done) or evaluate or stop:
                loop.save(done)
            if stop and (evaluate or done < plan.total_steps):
                raise Interrupted(f"stopped at step {done} of {plan.total_steps} with a checkpoint; run again to go on")
            if evaluation and evaluate:
                loop.evaluate(done, evaluation)
        tell_end(run, task, plan)
    return loop.latest


class _Loop(Generic[B]):
    """The state of one `fit`, and what happens in a step, in a log row and in a checkpoint."""

    def __init__(self, task: Task[B], run: Run, plan: StepPlan, optim: OptimConfig) -> None:
        self.task, self.run, self.plan, self.optim = task, run, plan, optim
        self.plain_model = task.model
        self.ema = build_ema(task.model.to(run.device), task.ema)
        self.result = self.ema.module if self.ema else task.model  # what is evaluated, and read from checkpoints
        if run.resumed:
            restore_weights(run.resumed, task.model, self.result)
        self.blank = blank_copy(task.model) if run.sharded else None  # to evaluate: whole again
        if plan.processes > 1:
            # Once: then each keeps the batch norms' statistics of its own batches, and `average_statistics` joins them.
            # What isn't contiguous, and can't be sent, is a constant.
            buffers = [*task.model.buffers(), *self.result.buffers()]
            broadcast([buffer for buffer in buffers if buffer.is_contiguous()])
        if run.sharded:
            for model in dict.fromkeys((task.model, self.result)):
                shard(model, run.device, run.accelerator.mixed_precision == "bf16")
        groups = parameter_groups(task.model, optim.weight_decay, task.layer_ids, optim.layer_decay)
        self.plain_optimizer = build_adamw(groups, optim)
        if run.resumed:
            restore_optimizer(self.plain_optimizer, scattered(run.resumed.optimizer_state(), self.plain_optimizer))
        if run.config.compile:
            # In place: names in checkpoints stay. And before DDP wraps it: what is compiled inside DDP's forward is cut
            # at its buckets (torch's DDPOptimizer), so that each is sent while the backward goes on.
            task.model.compile()
        # What is sharded is wrapped already; autocast is all that accelerate has to add.
        self.model = run.accelerator.prepare_model(task.model, evaluation_mode=run.sharded)
        self.optimizer = run.accelerator.prepare_optimizer(self.plain_optimizer)
        self.schedule = cosine_schedule(optim, plan.batch_size, plan.steps_per_epoch, plan.total_steps)
        self.grad_norms = None if run.sharded else task.grad_norms  # FSDP gives gradients to whole backwards alone
        self.meter = Meter(run.device, run.resumed.meter if run.resumed else None)
        self.generators = generators_of(run.device)
        self.garbage = FixedCollection()
        self.peak = peak_of(run)
        self.flops: float | None = None  # of an image's forward and backward, once counted
        self.last_good: Path | None = run.resumed.path if run.resumed else None
        self.writer = MetricsWriter(run.folder / "metrics.jsonl", run.start_step, writes=run.is_main)
        self.latest: dict[str, Any] = (run.resumed.metrics if run.resumed else {}) | self.writer.latest
        self.best = task.evaluation.best if task.evaluation else None
        self.best_value = self._former_best() if self.best and run.resumed else float("-inf")
        self.watch = Stopwatch()
        self.pace = Pace(plan.total_steps)

    def _former_best(self) -> float:
        """What the best checkpoint up to now reached; one of steps that are still to come is none of this run's."""
        former = best_checkpoint(self.run.checkpoints)
        self.run.accelerator.wait_for_everyone()  # all have looked before one renames it
        if former is None or self.best is None:
            return float("-inf")
        if former.step > self.run.start_step:
            if self.run.is_main:
                log.warning("%s is of step %d, after this start: the best is chosen anew", former.path, former.step)
                retire_best(former)
            return float("-inf")
        return float(former.metrics.get(self.best, "-inf"))

    def train_step(self, step: int, batches: Iterator[B]) -> None:
        self.model.train()
        set_lr(self.plain_optimizer, self.schedule(step))
        for micro in range(self.plan.accum_iter):
            batch = self._next(batches)
            if self.grad_norms and micro == 0 and self.grad_norms.due(step):
                self.meter.norms |= self._single_losses(self.grad_norms, step, batch)
            # Only now: starting the loader draws from the global generators too, after a resume and not before.
            seed_generators(self.generators, self.run.config.seed, step, micro, self.run.rank)
            if micro + 1 < self.plan.accum_iter:
                with self.run.accelerator.no_sync(self.model):
                    self._backward(batch)
            else:
                self._backward(batch)
            if self.peak and self.flops is None:
                self.flops = self._count_flops(batch)
        self._clip(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.plain_model, step + 1)
        self.watch.steps += 1
        self.bar.advance(1)

    def _backward(self, batch: B) -> None:
        values = self.task.losses(self.model, batch)
        self.run.accelerator.backward(values["loss"] / self.plan.accum_iter)
        self.meter.add(values)

    def _next(self, batches: Iterator[B]) -> B:
        began = time.perf_counter()
        batch = next(batches)
        self.watch.waited += time.perf_counter() - began
        return batch

    def _single_losses(self, grad_norms: GradNorms, step: int, batch: B) -> dict[str, Tensor]:
        """By the model itself, not by DDP's wrapper of it, which would count the extra passes as a step's."""

        def losses() -> dict[str, Tensor]:
            seed_generators(self.generators, self.run.config.seed, step, 0, self.run.rank)
            return self._eagerly(batch)

        began = time.perf_counter()
        norms = grad_norms.measure(losses)
        self.watch.leave_out(time.perf_counter() - began)
        return norms

    def _eagerly(self, batch: B) -> dict[str, Tensor]:
        # Compiled under another context than the step's, it would be compiled for the step once more.
        with torch.compiler.set_stance("force_eager"), self.run.accelerator.autocast():
            return self.task.losses(self.plain_model, batch)

    def _count_flops(self, batch: B) -> float:
        """Of an image. After a real step, and before the next one sets its random numbers."""
        began = time.perf_counter()
        flops = count_flops(self.plain_model, lambda: self._eagerly(batch))
        self.watch.leave_out(time.perf_counter() - began)
        return flops * self.plan.accum_iter * self.plan.processes / self.plan.batch_size

    def _clip(self, step: int) -> None:
        limit = self.optim.clip_grad
        logged = (step + 1) % self.run.config.log_every == 0 or step == 0 or step + 1 == self.plan.total_steps
        if limit is not None or logged:
            norm = self.run.accelerator.clip_grad_norm_(self.model.parameters(), limit or float("inf"))
            self.meter.norms["grad_norm"] = whole(norm.detach())

    def log(self, done: int) -> None:
        self._check_finite(done)
        elapsed, wait = self.watch.elapsed, self.watch.wait_share
        images = self.watch.steps * self.plan.batch_size
        losses, norms = self.meter.take()
        means = self._mean(losses)
        row: dict[str, Any] = {"epoch": done / self.plan.steps_per_epoch, **means}
        row |= {"lr": self.schedule(done - 1), "images_per_s": images / elapsed, "data_wait": wait}
        row["checkpoint_s"] = self.watch.saved
        if self.peak and self.flops:
            row["mfu"] = self.flops * row["images_per_s"] / self.plan.processes / self.peak
        row |= self._mean(norms)
        row["memory_gib"] = peak_memory(self.run.device) / 2**30
        self._write(done, row)
        self.bar.advance(0, loss=f"{means['loss']:.4f}", img_s=f"{row['images_per_s']:.0f}", wait=f"{wait:.0%}")
        self.watch.reset()

    def catch_up(self, evaluation: Evaluation) -> None:
        """Evaluate the checkpoint gone on from, if the run was stopped before it could."""
        done = self.run.start_step
        if self.run.any_process(not self.writer.was_evaluated(done)):
            self.evaluate(done, evaluation)

    def evaluate(self, done: int, evaluation: Evaluation) -> None:
        began = time.perf_counter()
        self._check_finite(done, weights=True)  # nothing else may become the best
        # Not inference mode: tensors born in it, as a moved model's buffers, could take no part in training.
        with torch.no_grad(), self.run.accelerator.autocast(), self.garbage.as_ever():
            average_statistics(self.result)
            result = fill(self.blank, self.result, self.run.device) if self.blank else self.result
            values = evaluation.measure(result.eval(), done)
            if self.blank:
                self.blank.to("meta")  # free its memory
        self.latest |= values
        if self.best and values.get(self.best, float("-inf")) > self.best_value:
            self.best_value, saving = values[self.best], time.perf_counter()
            best = self._save(f"best-{done:08d}", done)
            if self.run.is_main:
                make_best(best)
            self.watch.saved += time.perf_counter() - saving
        seconds = time.perf_counter() - began
        self._write(done, {**values, "evaluation_s": seconds})  # last: a row says that there is nothing to catch up on
        self.watch.leave_out(time.perf_counter() - began)

    def save(self, done: int) -> None:
        began = time.perf_counter()
        self._check_finite(done, weights=True)
        for model in dict.fromkeys((self.plain_model, self.result)):
            average_statistics(model)
        meter = {"count": self.meter.count, "sums": self._mean(self.meter.sums), "norms": self._mean(self.meter.norms)}
        path = self._save(f"step-{done:08d}", done, meter, resumable=True)
        if self.run.is_main:
            prune(self.run.checkpoints, self.run.config.keep_checkpoints, path.name)
        self.garbage.all()
        self.run.accelerator.wait_for_everyone()
        self.last_good = path
        seconds = time.perf_counter() - began
        self.watch.leave_out(seconds)
        self.watch.saved += seconds

    def _save(self, name: str, done: int, meter: Mapping[str, Any] | None = None, resumable: bool = False) -> Path:
        path, keep = self.run.checkpoints / name, self.run.is_main
        state, optimizer_state, trained_state = gathered(self.result.state_dict(), keep), None, None
        if resumable:
            optimizer_state = gathered(self.plain_optimizer.state_dict(), keep)
            trained_state = gathered(self.plain_model.state_dict(), keep) if self.ema else None
        if self.run.is_main:
            checkpoint = Checkpoint(path, done, self.run.identity, self.latest, dict(meter or {}))
            save_checkpoint(checkpoint, state, self.task.spec, self.run.config, optimizer_state, trained_state)
        return path

    def _mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Over all processes, which are asked once for all of them."""
        if not values:
            return {}
        means = self.run.accelerator.reduce(torch.stack([value.float() for value in values.values()]), "mean")
        return dict(zip(values, means.tolist(), strict=True))

    def progress(self) -> Progress:
        done, show = self.run.start_step, self.run.is_main
        self.bar = Progress(self.plan.total_steps, self.task.name, "step", done=done, show=show)
        return self.bar

    def _write(self, done: int, row: dict[str, Any]) -> None:
        self.latest |= row
        self.writer.write(done, row)
        if self.run.accelerator.trackers:
            self.run.accelerator.log(row, step=done)

    def _check_finite(self, done: int, weights: bool = False) -> None:
        """Every process leaves if one of them met a bad loss; with `weights`, also if an update spoiled the model."""
        first = self.meter.first_bad()
        bad = -1 if first is None else self.run.start_step + first // self.plan.accum_iter
        if weights and bad < 0 and not all(bool(share(p).isfinite().all()) for p in self.plain_model.parameters()):
            bad = done - 1
        if self.run.any_process(bad >= 0):
            bad = bad if bad >= 0 else done - 1  # another process knows it better
            good = self.last_good or "none yet"
            raise TrainingError(
                f"the loss became non-finite at step {bad} (lr {self.schedule(bad):.3g}); last checkpoint: {good}; "
                "lower optim.blr, set optim.clip_grad=1, or use precision=bf16 or fp32"
            )
