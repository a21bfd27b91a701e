"""A run's folder and its trackers."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.training.run import Run, RunConfig


class Wandb(ModuleType):
    """Weights & Biases, as far as a run talks to it."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.opened: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def init(self, **keys: Any) -> "Wandb":
        self.opened.append(keys)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def config(output: Path, **keys: Any) -> RunConfig:
    return RunConfig.model_validate({"output": str(output), "tensorboard": False, **keys})


def test_weights_and_biases_gets_the_project_the_config_and_one_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    asked = config(tmp_path / "photos", wandb=True, epochs=7)
    for _ in range(2):
        run = Run(asked, {})
        run.accelerator.log({"loss": 0.5}, step=3)
        run.close()
    first, second = wandb.opened
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("mrmae", "photos", "allow")
    assert first["config"] == asked.model_dump(mode="json")
    assert first["dir"] == str(tmp_path / "photos")
    assert (tmp_path / "photos/wandb-id").read_text() == first["id"]
    assert wandb.logged == [(3, {"loss": 0.5})] * 2
    assert wandb.finished == 2
    Run(config(tmp_path / "other", wandb=True), {})
    assert wandb.opened[-1]["id"] != first["id"]


def test_without_the_package_the_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == "wandb" else find(name, *of))
    with pytest.raises(ConfigError, match=r"isn't installed: pip install -e '\.\[wandb\]'$"):
        Run(config(tmp_path / "run", wandb=True), {})
    assert not (tmp_path / "run").exists()


def test_tensorboard_lies_in_the_run_folder(tmp_path: Path) -> None:
    run = Run(config(tmp_path / "run", tensorboard=True), {})
    run.accelerator.log({"loss": 0.5}, step=3)
    run.close()
    assert list((tmp_path / "run/tensorboard").glob("events.out.tfevents.*"))
