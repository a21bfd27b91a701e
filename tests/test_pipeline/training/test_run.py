"""A run's folder and its trackers."""

import importlib.util
import json
import logging
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from pipeline.configs.training import RunConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.training import run as run_module
from pipeline.training.checkpoint import Checkpoint, save_checkpoint
from pipeline.training.run import Run
from tests.test_pipeline.test_locks import holder


class Wandb(ModuleType):
    """Weights & Biases, as far as a run talks to it."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.opened: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished: list[int] = []

    def init(self, **keys: Any) -> "Wandb":
        self.opened.append(keys)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.finished.append(exit_code)


def config(output: Path, **keys: Any) -> RunConfig:
    return RunConfig.model_validate({"output": str(output), "tensorboard": False, **keys})


def test_weights_and_biases_gets_the_project_the_config_and_one_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    asked = config(tmp_path / "photos", wandb=True, epochs=7)
    for _ in range(2):
        with Run(asked, {}) as run:
            run.accelerator.log({"loss": 0.5}, step=3)
    first, second = wandb.opened
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("mrmae", "photos", "allow")
    assert first["config"] == asked.model_dump(mode="json")
    assert first["dir"] == str(tmp_path / "photos")
    assert (tmp_path / "photos/wandb-id").read_text() == first["id"]
    assert wandb.logged == [(3, {"loss": 0.5})] * 2
    assert wandb.finished == [0, 0]
    with pytest.raises(ConfigError), Run(config(tmp_path / "other", wandb=True), {}):
        raise ConfigError("an error in training")
    assert wandb.opened[-1]["id"] != first["id"]
    assert wandb.finished == [0, 0, 1]


def test_without_the_package_the_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == "wandb" else find(name, *of))
    with pytest.raises(ConfigError, match=r"isn't installed: pip install -e '\.\[wandb\]'$"):
        Run(config(tmp_path / "run", wandb=True), {})
    assert not (tmp_path / "run").exists()


def test_tensorboard_lies_in_the_run_folder(tmp_path: Path) -> None:
    with Run(config(tmp_path / "run", tensorboard=True), {}) as run:
        run.accelerator.log({"loss": 0.5}, step=3)
    assert list((tmp_path / "run/tensorboard").glob("events.out.tfevents.*"))


def stop(output: Path, step: int, identity: dict[str, Any]) -> Path:
    path = output / f"checkpoints/step-{step:08d}"
    save_checkpoint(Checkpoint(path, step, identity, metrics={}), nn.Linear(1, 1).state_dict(), {})
    return path


def test_what_may_change_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stop(tmp_path, 3, {"seed": 0, "samples": "10 (a)"})
    with pytest.raises(CheckpointError, match=r"with samples=10 \(a\), this one has samples=11 \(b\)"):
        Run(config(tmp_path), {"seed": 0, "samples": "11 (b)"})
    with caplog.at_level(logging.WARNING):
        run = Run(config(tmp_path), {"seed": 0, "samples": "11 (b)", "new": 1}, may_change=("samples",))
    assert run.start_step == 3  # and a key that the stopped run didn't know is no difference
    assert "samples was 10 (a) when the run stopped and is 11 (b) now" in caplog.text


def test_a_start_cleans_what_killed_ones_left_and_is_the_only_writer(tmp_path: Path) -> None:
    for name in (".config.yaml.ab12.partial", "checkpoints/.step-00000001.partial/model.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with Run(config(tmp_path), {}):
        assert sorted(os.listdir(tmp_path)) == ["checkpoints", "config.yaml", "run.lock", "train.log"]
        assert os.listdir(tmp_path / "checkpoints") == []
    assert not (tmp_path / "run.lock").exists()


def test_a_tracker_that_fails_after_an_error_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(_tracker: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.finish", finish)
    run = Run(config(tmp_path, tensorboard=True), {})
    with pytest.raises(CheckpointError, match="the first"), run:
        raise CheckpointError("the first")
    assert not (tmp_path / "run.lock").exists()


def test_a_second_run_in_the_folder_is_refused_before_it_writes(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with holder(tmp_path / "run.lock") as first, pytest.raises(ConfigError, match=f"written by process {first.pid} on"):
        Run(config(tmp_path), {})
    assert (tmp_path / "config.yaml").read_text() == "seed: 1\n"


def test_a_run_without_a_whole_checkpoint_is_not_started_over(tmp_path: Path) -> None:
    (stop(tmp_path, 3, {}) / "model.safetensors").unlink()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(CheckpointError, match=r"holds checkpoints, none of them whole: .* move them away"):
        Run(config(tmp_path), {})
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize(
    ("other", "message"),
    [({"step": 0}, r"disagree on step \(0, 3\): output"), ({"samples": "9"}, r"disagree on samples \(10, 9\)")],
)
def test_processes_that_see_different_things_do_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], message: str
) -> None:
    identity = {"seed": 0, "samples": "10"}
    stop(tmp_path, 3, identity)

    def gather(mine: list[str]) -> list[str]:
        return [*mine, json.dumps({**json.loads(mine[0]), **other}, sort_keys=True)]

    monkeypatch.setattr(run_module, "gather_object", gather)
    with pytest.raises(CheckpointError, match=message):
        Run(config(tmp_path), identity)


def test_precision_and_compilation_that_change_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stop(tmp_path, 3, {"seed": 0, "precision": "bf16", "compile": True})
    run = Run(config(tmp_path, precision="fp32"), {"seed": 0})
    assert run.start_step == 3
    assert "precision was bf16 when the run stopped and is fp32 now: it goes on, but not exactly" in caplog.text
    assert "compile was True when the run stopped and is False now" in caplog.text
    caplog.clear()
    stop(tmp_path, 4, run.identity)
    assert Run(config(tmp_path, precision="fp32"), {"seed": 0}).start_step == 4
    assert not caplog.text
