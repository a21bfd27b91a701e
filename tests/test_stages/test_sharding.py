"""Sharded training by two processes: DDP's losses, whole checkpoints, and any number of processes to go on with."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipeline.training.metrics import read_metrics
from stages import extract_teacher_features, pretrain
from tests.micro import without_key_biases
from tests.test_stages.conftest import ENCODER, MICRO, extract_config, pretrain_config
from tests.test_stages.test_processes import forked_ranks, launch

LAST = "checkpoints/step-00000006"


def words(keys: Mapping[str, Any], output: Path, sharding: str) -> list[str]:
    """The keys as words of a command line."""
    given = {**keys, "output": output, "sharding": sharding, "tensorboard": "false", "log_every": 1}
    return [f"{key}={value}".replace("'", "") for key, value in given.items()]


def pretrain_keys(image_tree: Path, folder: Path) -> dict[str, Any]:
    """Six steps of a micro student, with all that a step may have."""
    labelled = {"path": str(image_tree), "workers": 0}
    return {
        "data": labelled,
        "cache.path": folder / "cache",
        "student": {**MICRO, "gradient_checkpointing": "true"},
        "optim": {"lr": 1e-3, "warmup_epochs": 0, "clip_grad": 1.0},
        "batch_size": 8,
        "accum_iter": 2,
        "max_steps": 6,
        "checkpoint_every": 3,
        "keep_checkpoints": 5,
        "knn": {"data": labelled, "val": labelled, "every": 1, "k": 1},
    }


def in_two_processes(command: str, keys: Mapping[str, Any], output: Path, sharding: str) -> str:
    """What the first process said."""
    ranks = forked_ranks(2, command, *words(keys, output, sharding))
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr + ranks[1].stderr
    return ranks[0].stderr


def column(run: Path, key: str) -> list[float]:
    return [row[key] for row in read_metrics(run / "metrics.jsonl") if key in row]


def stopped_at_step_3(run: Path, copy: Path) -> Path:
    shutil.copytree(run, copy, symlinks=True)
    shutil.rmtree(copy / LAST)
    return copy


def test_two_processes_train_in_shares_as_whole_and_either_goes_on_from_the_other(
    image_tree: Path, tmp_path: Path
) -> None:
    extract_teacher_features.run(extract_config(image_tree, tmp_path / "cache"))
    keys, ddp, fsdp = pretrain_keys(image_tree, tmp_path), tmp_path / "ddp", tmp_path / "fsdp"
    in_two_processes("pretrain", keys, ddp, "ddp")
    assert "in 2 shares (fsdp)" in in_two_processes("pretrain", keys, fsdp, "fsdp")
    gone_on = stopped_at_step_3(ddp, tmp_path / "ddp_then_fsdp")
    in_two_processes("pretrain", keys, gone_on, "fsdp")
    alone = stopped_at_step_3(fsdp, tmp_path / "fsdp_then_alone")
    config = {"data": {"path": str(image_tree), "workers": 0}, "cache": {"path": str(tmp_path / "cache")}}
    config |= {"accum_iter": 4, "student": {**MICRO, "gradient_checkpointing": True}, "checkpoint_every": 3}
    optim = {"lr": 1e-3, "warmup_epochs": 0, "clip_grad": 1.0}
    pretrain.run(pretrain_config(alone, optim=optim, **config))

    expected = without_key_biases(load_file(ddp / LAST / "model.safetensors"))
    for run in (fsdp, gone_on, alone):
        for key in ("loss", "grad_norm"):
            assert column(run, key) == pytest.approx(column(ddp, key), rel=1e-5)
        weights = without_key_biases(load_file(run / LAST / "model.safetensors"))
        assert list(weights) == list(expected)
        for name, values in weights.items():
            torch.testing.assert_close(values, expected[name], rtol=0, atol=1e-4)
    assert column(fsdp, "knn_top1") == column(ddp, "knn_top1") == [1.0, 1.0]


@pytest.mark.slow  # starts torch in two processes, three times
def test_a_killed_sharded_run_ends_as_one_that_was_not(image_tree: Path, tmp_path: Path) -> None:
    extract_teacher_features.run(extract_config(image_tree, tmp_path / "cache"))
    keys = {**pretrain_keys(image_tree, tmp_path), "max_steps": 12, "checkpoint_every": 1}
    in_two_processes("pretrain", keys, tmp_path / "through", "fsdp")
    killed, deadline = tmp_path / "killed", time.monotonic() + 240
    process = launch(2, "pretrain", *words(keys, killed, "fsdp"))
    while len(list((killed / "checkpoints").glob("step-*"))) < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    launcher = psutil.Process(process.pid)
    started = [*launcher.children(recursive=True), launcher]
    for victim in started:
        victim.kill()
    process.communicate()
    psutil.wait_procs(started, timeout=30)  # the run's lock is theirs until they are gone
    in_two_processes("pretrain", keys, killed, "fsdp")
    last = "checkpoints/step-00000012/model.safetensors"
    assert column(killed, "loss") == column(tmp_path / "through", "loss")
    assert (killed / last).read_bytes() == (tmp_path / "through" / last).read_bytes()


@pytest.mark.slow  # starts torch in two processes, twice
def test_fine_tuning_in_shares_keeps_the_average_of_weights(colours: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "data": {"path": str(colours / "train"), "workers": 0},
        "val": {"path": str(colours / "val"), "workers": 0},
        "student": ENCODER,
        "image_size": 64,
        "optim": {"lr": 3e-3, "warmup_epochs": 0},
        "ema.decay": 0.9,
        "batch_size": 8,
        "max_steps": 6,
        "checkpoint_every": 3,
        "eval_batch_size": 5,  # 6 images for one process, 6 for the other
    }
    for sharding in ("ddp", "fsdp"):
        in_two_processes("finetune", keys, tmp_path / sharding, sharding)
    for key in ("loss", "top1"):
        assert column(tmp_path / "fsdp", key) == pytest.approx(column(tmp_path / "ddp", key), rel=1e-5)
    for file in ("model.safetensors", "trained.safetensors"):
        whole, shares = (without_key_biases(load_file(tmp_path / run / LAST / file)) for run in ("ddp", "fsdp"))
        for name, values in whole.items():
            torch.testing.assert_close(shares[name], values, rtol=0, atol=1e-4)
