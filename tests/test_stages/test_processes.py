"""Several processes on one machine: the same bytes, the same stream of samples, the same training."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipeline.evaluation.records import read_records
from pipeline.training.metrics import read_metrics
from stages import extract_teacher_features, knn, linear_probe, pretrain
from tests import forked
from tests.micro import without_key_biases
from tests.ranks import Rendezvous
from tests.test_stages.conftest import ENCODER, MICRO, extract_config, pretrain_config, sets
from tests.test_stages.test_extract_teacher_features import content

ROOT = Path(__file__).parents[2]


def launch(processes: int, *arguments: str) -> forked.Popen:
    """Start the command line in so many processes on the CPU, by torch's launcher: it alone is forked."""
    launcher = [sys.executable, "-c", "from torch.distributed.run import main; main()"]
    return forked.Popen(
        [*launcher, "--standalone", f"--nproc_per_node={processes}", "-m", "cli", *arguments],
        cwd=ROOT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in so many processes to its end."""
    process = launch(processes, *arguments)
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(arguments, process.wait(), output, errors)


def forked_ranks(processes: int, *arguments: str) -> list["subprocess.CompletedProcess[str]"]:
    """As torchrun starts them, without its own seconds and those of each interpreter."""
    rendezvous = Rendezvous(processes)

    def start(rank: int) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **rendezvous.environment(rank)}
        return forked.run([*forked.CLI, *arguments], cwd=ROOT, text=True, env=environment)

    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(start, range(processes)))


def test_two_processes_extract_the_same_bytes_as_one(image_tree: Path, tmp_path: Path) -> None:
    config = extract_config(image_tree, tmp_path / "one")
    extract_teacher_features.run(config)
    first, second = forked_ranks(
        2,
        "extract-teacher-features",
        f"data={{path: {image_tree}, workers: 0}}",
        "teacher={spec: timm:test_vit, weights: random, image_size: 64}",
        "views={count: 2, image_size: 64}",
        f"cache={{path: {tmp_path}/two, samples_per_shard: 8}}",
        "batch_size=16",
    )
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "images        16\n" in first.stdout  # the first process took two of the three shards
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_two_processes_train_as_one_and_one_goes_on_where_two_stopped(
    image_tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extract_teacher_features.run(extract_config(image_tree, tmp_path / "cache", cache__summary=True))
    labelled = {"path": str(image_tree), "workers": 0}
    common: dict[str, Any] = {"data": labelled, "cache": {"path": str(tmp_path / "cache")}}
    common["mimic"] = {"summary_weight": 1.0}
    common["knn"] = {"data": labelled, "val": labelled, "every": 1, "k": 1}
    pretrain.run(pretrain_config(tmp_path / "one", checkpoint_every=3, keep_checkpoints=5, **common))
    micro = ", ".join(f"{key}: {value}" for key, value in MICRO.items())
    arguments = [
        "pretrain", f"data={{path: {image_tree}, workers: 0}}", f"cache.path={tmp_path}/cache", f"student={{{micro}}}",
        "optim={lr: 1e-3, warmup_epochs: 0}", "batch_size=8", "max_steps=6", "log_every=1", "tensorboard=false",
        "mimic.summary_weight=1.0", f"output={tmp_path}/two", "checkpoint_every=3", "keep_checkpoints=5",
        f"knn={{data: {{path: {image_tree}, workers: 0}}, val: {{path: {image_tree}, workers: 0}}, every: 1, k: 1}}",
    ]  # fmt: skip
    done = torchrun(2, *arguments)
    assert done.returncode == 0, done.stderr

    rows = {run: read_metrics(tmp_path / run / "metrics.jsonl") for run in ("one", "two")}
    losses = {run: [row["loss"] for row in of_run if "loss" in row] for run, of_run in rows.items()}
    assert len(losses["one"]) == 6
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)  # sums in another order, nothing else
    watched = {run: [row["knn_top1"] for row in of_run if "knn_top1" in row] for run, of_run in rows.items()}
    assert watched["two"] == watched["one"] == [1.0, 1.0]  # every image is its own neighbour, in whichever share

    shutil.rmtree(tmp_path / "two/checkpoints/step-00000006")
    caplog.clear()
    with caplog.at_level("INFO", logger="pipeline"):
        pretrain.run(pretrain_config(tmp_path / "two", checkpoint_every=3, keep_checkpoints=5, **common))
    assert f"resumed from {tmp_path}/two/checkpoints/step-00000003" in caplog.text
    gone_on = read_metrics(tmp_path / "two/metrics.jsonl")
    assert gone_on[:4] == rows["two"][:4]  # what two had trained was not trained again, nor evaluated
    assert [row["step"] for row in gone_on] == [row["step"] for row in rows["two"]] == [1, 2, 3, 3, 4, 5, 6, 6]
    one, two = (
        without_key_biases(load_file(tmp_path / run / "checkpoints/step-00000006/model.safetensors"))
        for run in ("one", "two")
    )
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


def test_two_processes_share_the_forward_passes_and_find_what_one_finds(colours: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {**sets(colours), "student": ENCODER, "image_size": 64}
    figures = {
        stage: module.run(config.model_validate({**keys, "output": tmp_path / "one", **own}))
        for stage, module, config, own in (
            ("knn", knn, knn.KnnConfig, {"k": 13}),  # more than one of two processes has
            ("linear_probe", linear_probe, linear_probe.LinearProbeConfig, {"batch_size": 8}),
        )
    }
    micro = ", ".join(f"{key}: {value}" for key, value in ENCODER.items())
    first, second = forked_ranks(
        2, "knn", f"data={{path: {colours}/train, workers: 0}}", f"val={{path: {colours}/val, workers: 0}}",
        f"student={{{micro}}}", "image_size=64", "k=13", "eval_batch_size=5", f"output={tmp_path}/two",
    )  # fmt: skip
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert (first.stdout + second.stdout).count("top1") == 1
    record = read_records(tmp_path / "two/metrics.json")["knn"]
    assert record.pop("made")["processes"] == 2
    assert record == figures["knn"]
    features = [sorted((tmp_path / run / "features").iterdir()) for run in ("one", "two")]
    assert [file.name for file in features[0]] == [file.name for file in features[1]]
    for one, two in zip(*features, strict=True):
        torch.testing.assert_close(load_file(two), load_file(one), rtol=1e-5, atol=1e-5)  # in batches of another size
    probed = linear_probe.run(
        linear_probe.LinearProbeConfig.model_validate({**keys, "output": tmp_path / "two", "batch_size": 8})
    )
    assert probed == figures["linear_probe"]


@pytest.mark.slow  # starts torch in two processes, twice
@pytest.mark.parametrize("struck", ["launcher", "one process"])
def test_a_signal_stops_both_processes_at_one_step_and_the_run_goes_on(
    image_tree: Path, tmp_path: Path, struck: str, caplog: pytest.LogCaptureFixture
) -> None:
    extract_teacher_features.run(extract_config(image_tree, tmp_path / "cache"))
    micro = ", ".join(f"{key}: {value}" for key, value in MICRO.items())
    process = launch(
        2, "pretrain", f"data={{path: {image_tree}, workers: 0}}", f"cache.path={tmp_path}/cache",
        f"student={{{micro}}}", "optim={lr: 1e-3, warmup_epochs: 0}", "batch_size=8", "epochs=100000", "log_every=1",
        "tensorboard=false", f"output={tmp_path}/run", "checkpoint_every=1000000",
    )  # fmt: skip
    metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if struck == "launcher":
        process.send_signal(signal.SIGTERM)  # which passes it on
    else:
        workers = [child for child in psutil.Process(process.pid).children() if "pretrain" in child.cmdline()]
        assert len(workers) == 2
        workers[1].send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    stopped = re.findall(r"error: stopped at step (\d+) of 300000 with a checkpoint; run again to go on", errors)
    assert len(stopped) == 2, errors
    assert stopped[0] == stopped[1]
    (kept,) = (tmp_path / "run/checkpoints").glob("step-*")
    step = int(stopped[0])
    assert kept.name == f"step-{step:08d}"
    assert read_metrics(metrics)[-1]["step"] == step
    common = {"data": {"path": str(image_tree), "workers": 0}, "cache": {"path": str(tmp_path / "cache")}}
    with caplog.at_level("INFO", logger="pipeline"):
        pretrain.run(pretrain_config(tmp_path / "run", epochs=100000, max_steps=step + 2, **common))
    assert f"resumed from {kept}" in caplog.text
    assert [row["step"] for row in read_metrics(metrics)] == list(range(1, step + 3))
