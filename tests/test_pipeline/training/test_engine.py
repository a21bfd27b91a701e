"""The loop on a linear model: what it evaluates, logs, clips and keeps, and that a stop anywhere changes nothing."""

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pipeline.configs.training import OptimConfig, RunConfig
from pipeline.errors import TrainingError
from pipeline.steps import StepPlan
from pipeline.training import checkpoint, engine
from pipeline.training.checkpoint import load_checkpoint
from pipeline.training.engine import fit
from pipeline.training.interruption import Interrupted
from pipeline.training.metrics import MetricsWriter
from pipeline.training.run import Run
from pipeline.training.task import Evaluation, Task

STEPS, ACCUM = 12, 2
OF_TIME = {"images_per_s", "data_wait", "checkpoint_s", "evaluation_s", "memory_gib"}


class Killed(BaseException):
    """Like SIGKILL, nothing in the program handles it."""


@dataclass
class Training:
    """One start of a run, and what happens in it."""

    output: Path
    evaluate_every: int = 0
    at_step: Callable[[int], None] = lambda _: None
    at_evaluation: Callable[[int], None] = lambda _: None
    spoil: Callable[[int, Tensor], Tensor] = lambda _, loss: loss
    config: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    evaluated: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)  # the steps, one entry a micro-batch

    def __call__(self) -> dict[str, Any]:
        torch.manual_seed(0)
        keys = {"output": str(self.output), "tensorboard": False, "log_every": 5, "checkpoint_every": 3} | self.config
        run = Run(RunConfig.model_validate({"batch_size": 4, "accum_iter": ACCUM, **keys}), {"seed": 0})
        evaluation = Evaluation(self._evaluate, self.evaluate_every, "score") if self.evaluate_every else None
        return fit(
            Task("train", nn.Linear(3, 2), {"kind": "test"}, self._losses, self, evaluation),
            run,
            StepPlan(4, STEPS, 4, ACCUM, 1),
            OptimConfig.model_validate({"lr": 0.01, "warmup_epochs": 0, **self.optim}),
        )

    def batches(self, _plan: StepPlan, start: int) -> Iterator[Tensor]:
        self.start = start
        for step in range(start, STEPS):
            for micro in range(ACCUM):
                yield torch.randn(2, 3, generator=torch.Generator().manual_seed(step * ACCUM + micro))

    def _losses(self, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        self.trained.append(self.start + len(self.trained) // ACCUM)
        self.at_step(self.trained[-1])
        loss = self.spoil(self.trained[-1], (model(x) + torch.randn(2, 2)).square().mean())
        return {"loss": loss, "half_loss": loss / 2}

    def _evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        self.evaluated.append(step)
        self.at_evaluation(step)
        return {"score": float(model.weight.sum()) + (step % 8) / 8}  # type: ignore[operator]


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in OF_TIME}


def rows(output: Path) -> list[dict[str, Any]]:
    return [timeless(json.loads(line)) for line in (output / "metrics.jsonl").read_text().splitlines()]


def kill(at: int) -> Callable[[int], None]:
    def act(step: int) -> None:
        if step == at:
            raise Killed

    return act


def terminate(at: int, number: int = signal.SIGTERM) -> Callable[[int], None]:
    def act(step: int) -> None:
        if step == at:
            os.kill(os.getpid(), number)

    return act


def same(one: Path, other: Path) -> bool:
    """Rows and parameters to the last bit, and the best."""
    last = f"checkpoints/step-{STEPS:08d}/model.safetensors"
    assert rows(one) == rows(other)
    assert (one / last).read_bytes() == (other / last).read_bytes()
    if (one / "checkpoints/best").exists():
        best, others = (load_checkpoint(folder / "checkpoints/best") for folder in (one, other))
        assert (best.step, best.metrics["score"]) == (others.step, others.metrics["score"])
    return True


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    path = tmp_path_factory.mktemp("whole")
    Training(path)()
    return path


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that nothing stopped, evaluated every 4 steps, and what it returned."""
    training = Training(tmp_path_factory.mktemp("evaluated"), evaluate_every=4)
    facts = training()
    assert training.evaluated == [4, 8, 12]
    return training.output, timeless(facts)


@pytest.mark.parametrize("moment", ["evaluating", "best", "row", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("step", [4, STEPS])
def test_an_evaluation_that_a_stop_cut_off_is_made_up_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    evaluated: tuple[Path, dict[str, Any]],
    step: int,
    moment: str,
) -> None:
    whole, facts = evaluated
    stopped = Training(tmp_path / "stopped", evaluate_every=4)
    with monkeypatch.context() as patch:
        if moment == "evaluating":
            stopped.at_evaluation = kill(step)
        elif moment == "best":
            link = checkpoint.make_best

            def die_before_link(path: Path) -> None:
                kill(step)(int(path.name.removeprefix("best-")))
                link(path)

            patch.setattr(engine, "make_best", die_before_link)
        elif moment == "row":
            write = MetricsWriter.write

            def die_before_row(writer: MetricsWriter, at: int, values: dict[str, Any]) -> None:
                if "score" in values:
                    kill(step)(at)
                write(writer, at, values)

            patch.setattr(MetricsWriter, "write", die_before_row)
        else:
            stopped.at_step = terminate(step - 1, getattr(signal, moment))
        with pytest.raises((Killed, Interrupted)):
            stopped()
    resumed = Training(tmp_path / "stopped", evaluate_every=4)
    assert timeless(resumed()) == facts
    assert resumed.evaluated == list(range(step, STEPS + 1, 4))
    assert resumed.trained == [number for number in range(step, STEPS) for _ in range(ACCUM)]
    assert same(whole, tmp_path / "stopped")
    again = Training(tmp_path / "stopped", evaluate_every=4)
    assert timeless(again()) == facts
    assert (again.evaluated, again.trained) == ([], [])


@pytest.mark.parametrize("at", range(1, STEPS))
@pytest.mark.parametrize("how", [kill, terminate])
def test_rows_are_the_same_wherever_a_run_stopped(
    tmp_path: Path, whole: Path, how: Callable[[int], Callable[[int], None]], at: int
) -> None:
    """Rows every 5 steps, checkpoints every 3: a resumed run goes on in the middle of a mean."""
    with pytest.raises((Killed, Interrupted)) if at < STEPS - 1 or how is kill else nullcontext():
        Training(tmp_path / "stopped", at_step=how(at))()
    resumed = Training(tmp_path / "stopped")
    resumed()
    start = at // 3 * 3 if how is kill else at + 1
    assert resumed.trained == [step for step in range(start, STEPS) for _ in range(ACCUM)]
    assert same(whole, tmp_path / "stopped")


def test_a_kill_between_two_micro_batches_changes_nothing(tmp_path: Path, whole: Path) -> None:
    calls: list[int] = []

    def second_half(step: int) -> None:
        calls.append(step)
        if calls.count(7) == ACCUM:
            raise Killed

    with pytest.raises(Killed):
        Training(tmp_path / "stopped", at_step=second_half)()
    resumed = Training(tmp_path / "stopped")
    resumed()
    assert resumed.trained[0] == 6
    assert same(whole, tmp_path / "stopped")


def test_a_damaged_best_does_not_keep_a_run_from_going_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Killed):
        Training(tmp_path, evaluate_every=4, at_step=kill(9))()
    best = tmp_path / "checkpoints/best"
    assert load_checkpoint(best).step == 4
    (best / "model.safetensors").write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        Training(tmp_path, evaluate_every=4)()
    assert "the best is chosen anew from now on" in caplog.text
    assert load_checkpoint(best).step == 12


def test_the_gradient_is_clipped_and_its_norm_before_that_is_logged(tmp_path: Path) -> None:
    seen: list[float] = []

    def measure(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        seen.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))

    def train(name: str, limit: float | None) -> list[float]:
        seen.clear()
        Training(tmp_path / name, optim={"clip_grad": limit}, config={"log_every": 1})()
        return seen.copy()

    handle = register_optimizer_step_pre_hook(measure)
    try:
        free, clipped = train("free", None), train("clipped", 0.25)
    finally:
        handle.remove()
    assert min(free) > 0.3
    assert clipped == pytest.approx([0.25] * STEPS, rel=1e-4)
    assert [row["grad_norm"] for row in rows(tmp_path / "free")] == pytest.approx(free, rel=1e-6)
    assert rows(tmp_path / "clipped")[0]["grad_norm"] == pytest.approx(free[0], rel=1e-6)


@pytest.mark.parametrize("resume", [False, True])
def test_a_non_finite_loss_names_the_step_and_the_last_good_checkpoint(tmp_path: Path, resume: bool) -> None:
    if resume:
        with pytest.raises(Killed):
            Training(tmp_path, at_step=kill(7))()
    broken = Training(tmp_path, spoil=lambda step, loss: loss * float("nan") if step == 7 else loss)
    good = tmp_path / "checkpoints/step-00000006"
    with pytest.raises(TrainingError, match=rf"non-finite at step 7 \(lr .*\); last checkpoint: {good};"):
        broken()
    assert load_checkpoint(good).step == 6


def test_no_step_asks_the_other_processes_through_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def ask(_: Run, flag: bool) -> bool:
        asked.append(flag)
        return flag

    monkeypatch.setattr(Run, "any_process", ask)
    Training(tmp_path, config={"log_every": 100, "checkpoint_every": 100})()
    assert len(asked) == 3  # at the rows of the first and the last step, and at the last checkpoint


def test_each_checkpoint_holds_its_config_and_the_folder_that_of_the_newest_start(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        Training(tmp_path, at_step=terminate(3), config={"log_every": 7})()
    Training(tmp_path, evaluate_every=4, config={"log_every": 2, "keep_checkpoints": 9})()
    held = {path.parent.name: path.read_text() for path in tmp_path.glob("checkpoints/*/config.yaml")}
    assert "log_every: 7" in held["step-00000004"]
    assert "log_every: 2" in held["step-00000012"]
    assert "log_every: 2" in held["best"]
    assert "log_every: 2" in (tmp_path / "config.yaml").read_text()


def test_a_best_of_steps_that_are_trained_again_is_chosen_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best, last = (tmp_path / "checkpoints" / name / "model.safetensors" for name in ("best", "step-00000012"))
    Training(tmp_path, evaluate_every=STEPS, config={"keep_checkpoints": 9})()
    former = best.read_bytes()
    for step in (6, 9, 12):
        shutil.rmtree(tmp_path / f"checkpoints/step-{step:08d}")
    with caplog.at_level(logging.WARNING):
        Training(tmp_path, evaluate_every=STEPS, optim={"lr": 0.02})()
    assert "is of step 12, after this start: the best is chosen anew" in caplog.text
    assert best.read_bytes() == last.read_bytes() != former


def test_decay_and_betas_are_those_of_the_newest_start(tmp_path: Path) -> None:
    seen: list[tuple[float, tuple[float, float]]] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        seen.append(
            (max(group["weight_decay"] for group in optimizer.param_groups), optimizer.param_groups[0]["betas"])
        )

    with pytest.raises(Killed):
        Training(tmp_path, at_step=kill(7))()
    handle = register_optimizer_step_pre_hook(note)
    try:
        Training(tmp_path, optim={"weight_decay": 0.3, "betas": (0.8, 0.9)})()
    finally:
        handle.remove()
    assert set(seen) == {(0.3, (0.8, 0.9))}
    assert len(seen) == STEPS - 6
