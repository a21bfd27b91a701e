"""Several processes on one machine: the same bytes, the same stream of samples, the same training."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stages import extract_teacher_features, pretrain
from tests.test_stages.conftest import MICRO, extract_config, pretrain_config
from tests.test_stages.test_extract_teacher_features import content

ROOT = Path(__file__).parents[2]


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in so many processes on the CPU."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        "-m",
        "cli",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300
    )


def test_two_processes_extract_the_same_bytes_as_one(image_tree: Path, tmp_path: Path) -> None:
    config = extract_config(image_tree, tmp_path / "one")
    extract_teacher_features.run(config)
    done = torchrun(
        2,
        "extract-teacher-features",
        f"data={{path: {image_tree}, workers: 0}}",
        "teacher={spec: timm:vit_tiny_patch16_224, weights: random, image_size: 64}",
        "views={count: 2, image_size: 64}",
        f"cache={{path: {tmp_path}/two, samples_per_shard: 8}}",
        "batch_size=16",
    )
    assert done.returncode == 0, done.stderr
    assert "images        16\n" in done.stdout  # the first process took two of the three shards
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_two_processes_train_as_one_and_one_goes_on_where_two_stopped(image_tree: Path, tmp_path: Path) -> None:
    extract_teacher_features.run(extract_config(image_tree, tmp_path / "cache"))
    labelled = {"path": str(image_tree), "workers": 0}
    common: dict[str, Any] = {"data": labelled, "cache": {"path": str(tmp_path / "cache")}}
    common["knn"] = {"data": labelled, "val": labelled, "every": 1, "k": 1}
    pretrain.run(pretrain_config(tmp_path / "one", checkpoint_every=3, keep_checkpoints=5, **common))
    micro = ", ".join(f"{key}: {value}" for key, value in MICRO.items())
    arguments = [
        "pretrain", f"data={{path: {image_tree}, workers: 0}}", f"cache.path={tmp_path}/cache", f"student={{{micro}}}",
        "optim={lr: 1e-3, warmup_epochs: 0}", "batch_size=8", "max_steps=6", "log_every=1", "tensorboard=false",
        f"output={tmp_path}/two", "checkpoint_every=3", "keep_checkpoints=5",
        f"knn={{data: {{path: {image_tree}, workers: 0}}, val: {{path: {image_tree}, workers: 0}}, every: 1, k: 1}}",
    ]  # fmt: skip
    done = torchrun(2, *arguments)
    assert done.returncode == 0, done.stderr

    rows = {
        run: [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    }
    losses = {run: [row["loss"] for row in of_run if "loss" in row] for run, of_run in rows.items()}
    assert len(losses["one"]) == 6
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)  # sums in another order, nothing else
    watched = {run: [row["knn_top1"] for row in of_run if "knn_top1" in row] for run, of_run in rows.items()}
    assert watched["two"] == watched["one"] == [1.0, 1.0]  # every image is its own neighbour, in whichever share

    last = tmp_path / "two/checkpoints/step-00000006"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    pretrain.run(pretrain_config(tmp_path / "two", checkpoint_every=3, keep_checkpoints=5, **common))
    one, two = (load_file(tmp_path / run / "checkpoints/step-00000006/model.safetensors") for run in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)
