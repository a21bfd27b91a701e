"""Runs that go on after their `init` has changed or gone: a run's own checkpoint says what it started from."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.models import build_student, save_weights
from stages import detect, finetune, pretrain
from tests.coco import write_coco
from tests.test_stages.conftest import ENCODER, MICRO, PLAIN, pretrain_config, sets

pytestmark = pytest.mark.usefixtures("one_thread")
Again = Callable[..., dict[str, Any]]  # run the stage with some keys changed
SIZES = {**MICRO, "patch_size": 8}
DETECTOR = {"window": 4, "channels": 16, "anchors": [8, 16, 24, 32, 48], "rois": 16}


def student(folder: Path, seed: int = 0) -> str:
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    save_weights(build_student(**SIZES, objective="mae"), folder)
    return str(folder)


@pytest.fixture(params=["finetune", "finetune at another size", "detect", "pretrain"])
def stage(request: pytest.FixtureRequest, colours: Path, tmp_path: Path) -> Again:
    """A run of three steps from tmp_path/init, in tmp_path/OUT, with a checkpoint after each."""
    keys: dict[str, Any] = {
        "init": str(tmp_path / "init"), "batch_size": 2, "max_steps": 3, "checkpoint_every": 1, "keep_checkpoints": 9,
        "optim": {"lr": 1e-3, "warmup_epochs": 0}, "tensorboard": False,
    }  # fmt: skip
    if request.param == "pretrain":
        keys |= {"data": {"path": str(colours / "train"), "workers": 0}, "mimic": {"objective": "mae"}}
        keys |= {"views": {"image_size": 64}, "student": SIZES}
        return lambda out, **changes: pretrain.run(pretrain_config(tmp_path / out, **{**keys, **changes}))
    if request.param == "detect":
        folder, file = write_coco(tmp_path)
        images = {"images": str(folder), "annotations": str(file)}
        keys |= {"data": {"train": images, "val": images, "workers": 0}, "detector": DETECTOR, "image_size": 64}
        keys |= {"eval_every": 1000}
        config: Any = detect.DetectConfig
    else:
        keys |= {**sets(colours), "augment": PLAIN, "image_size": 96 if "size" in request.param else None}
        config = finetune.FinetuneConfig
    module: Any = detect if request.param == "detect" else finetune
    return lambda out, **changes: module.run(config.model_validate({**keys, "output": str(tmp_path / out), **changes}))


def weights(out: Path) -> bytes:
    return (out / "checkpoints/step-00000003/model.safetensors").read_bytes()


def test_a_run_goes_on_bit_for_bit_when_its_init_went_on_or_is_gone(stage: Again, tmp_path: Path) -> None:
    student(tmp_path / "init")
    stage("whole")
    shutil.copytree(tmp_path / "init", tmp_path / "elsewhere")
    for fate in ("gone", "went on", "moved"):
        shutil.copytree(tmp_path / "whole", tmp_path / fate)
        shutil.rmtree(tmp_path / fate / "checkpoints/step-00000003")
        shutil.rmtree(tmp_path / "init", ignore_errors=True)
        if fate == "went on":
            student(tmp_path / "init", seed=1)
        stage(fate, **({"init": str(tmp_path / "elsewhere")} if fate == "moved" else {}))
        assert weights(tmp_path / fate) == weights(tmp_path / "whole")


def test_another_init_given_on_purpose_is_refused(stage: Again, tmp_path: Path) -> None:
    student(tmp_path / "init")
    stage("out", max_steps=1)
    with pytest.raises(CheckpointError, match="holds a run with init="):
        stage("out", init=student(tmp_path / "other", seed=1))
    with pytest.raises(CheckpointError, match="absent does not exist"):
        stage("out", init=str(tmp_path / "absent"))
    with pytest.raises(CheckpointError, match=r"holds a run with (init|student)="):
        stage("out", init=None, student={**ENCODER, "patch_size": 8})


def test_a_run_that_begins_reads_its_init(stage: Again, tmp_path: Path) -> None:
    """A folder without a checkpoint has nothing to trust."""
    with pytest.raises(CheckpointError, match="init does not exist"):
        stage("out")
    student(tmp_path / "init")
    stage("out", max_steps=1)
    (tmp_path / "out/checkpoints/step-00000001/model.safetensors").write_bytes(b"torn")
    shutil.rmtree(tmp_path / "init")
    with pytest.raises(CheckpointError, match="none of them whole"):
        stage("out")
