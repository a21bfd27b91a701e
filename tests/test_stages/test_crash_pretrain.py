"""Pre-training killed with SIGKILL at any step, and resumed each time: the same parameters, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.training.checkpoint import load_checkpoint
from stages import extract_teacher_features, pretrain
from tests.test_stages.conftest import MICRO, extract_config, pretrain_config
from tests.test_stages.test_pretrain import losses, weights

ROOT = Path(__file__).parents[2]
KILLS = 8
STEPS = 90  # 24 images, 4 a step: an epoch ends every 6


def newest(output: Path) -> int:
    """The step of the newest checkpoint that has its final name."""
    names = [path.name for path in (output / "checkpoints").glob("step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


@pytest.mark.slow  # starts Python and torch eight times for each store
@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_killed_and_resumed_training_gives_the_same_parameters(image_tree: Path, tmp_path: Path, store: str) -> None:
    extract_teacher_features.run(extract_config(image_tree, tmp_path / "cache", cache__store=store))
    keys = {
        "data": {"path": str(image_tree), "workers": 1}, "cache": {"path": str(tmp_path / "cache")}, "epochs": 15,
        "batch_size": 4, "accum_iter": 2, "max_steps": STEPS, "checkpoint_every": 1,
    }  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes below: sums in another order are other bits
    pretrain.run(pretrain_config(tmp_path / "whole", **keys))
    torch.set_num_threads(threads)

    micro = ", ".join(f"{key}: {value}" for key, value in MICRO.items())
    command = [
        sys.executable, "-m", "cli", "pretrain", f"data={{path: {image_tree}, workers: 1}}",
        f"cache.path={tmp_path}/cache", f"student={{{micro}}}", "optim={lr: 1e-3, warmup_epochs: 0}", "epochs=15",
        "batch_size=4", "accum_iter=2", f"max_steps={STEPS}", "checkpoint_every=1", "log_every=1", "tensorboard=false",
        f"output={tmp_path}/killed",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output, moments, stopped = tmp_path / "killed", random.Random(store), []
    for _ in range(KILLS):
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
        )
        # Strike when this start has got a few steps on, at a random moment of a step or of its checkpoint.
        goal, deadline = newest(output) + moments.randint(1, 7), time.monotonic() + 120
        while newest(output) < goal and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.03))
        assert process.poll() is None, f"ended with {process.returncode} at step {newest(output)}"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        stopped.append(newest(output))
    assert len(set(stopped)) == KILLS
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
    whole, killed = weights(tmp_path / "whole"), weights(output)
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert losses(output) == losses(tmp_path / "whole")
    for path in (output / "checkpoints").glob("step-*"):
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            pytest.fail(f"a kill left a checkpoint that only looks whole: {error}")
