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
STEPS, EPOCH = 90, 6  # 24 images, 4 a step in two micro-batches

# The command line, which kills itself and its workers before the backward pass of one micro-batch, where asked to.
PROGRAM = """
import os, signal, sys
from pipeline.training.engine import _Loop
train_step, backward, passed = _Loop.train_step, _Loop._backward, []
def note(loop, step, *rest):
    passed[:] = [step, 0]
    train_step(loop, step, *rest)
def strike(loop, *rest):
    if ".".join(map(str, passed)) == os.environ.get("STRIKE"):
        os.killpg(0, signal.SIGKILL)
    passed[1] += 1
    backward(loop, *rest)
_Loop.train_step, _Loop._backward = note, strike
from cli import main
main()
"""


def newest(output: Path) -> int:
    """The step of the newest checkpoint that has its final name."""
    names = [path.name for path in (output / "checkpoints").glob("step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def aim(where: str, start: int) -> tuple[int, int]:
    """(step, micro-batch) to die in, at least two steps after `start`."""
    epoch_end = (start + 2 + EPOCH) // EPOCH * EPOCH
    return {
        "first batch of an epoch": (epoch_end, 0),
        "last batch of an epoch": (epoch_end - 1, 1),
        "between micro-batches": (epoch_end + 2, 1),
    }[where]


MOMENTS = [
    "any", "between micro-batches", "first batch of an epoch", "any", "last batch of an epoch",
    "first batch of an epoch",
]  # fmt: skip


@pytest.mark.slow  # starts Python and torch seven times for each store
@pytest.mark.parametrize(("store", "checkpoint_every", "log_every"), [("zarr", 1, 1), ("webdataset", 4, 5)])
def test_killed_and_resumed_training_gives_the_same_parameters(
    image_tree: Path, tmp_path: Path, store: str, checkpoint_every: int, log_every: int
) -> None:
    extract_teacher_features.run(extract_config(image_tree, tmp_path / "cache", cache__store=store))
    every = {"checkpoint_every": checkpoint_every, "log_every": log_every}
    keys = {
        "data": {"path": str(image_tree), "workers": 1}, "cache": {"path": str(tmp_path / "cache")}, "epochs": 15,
        "batch_size": 4, "accum_iter": 2, "max_steps": STEPS, **every,
    }  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes below: sums in another order are other bits
    pretrain.run(pretrain_config(tmp_path / "whole", **keys))
    torch.set_num_threads(threads)

    micro = ", ".join(f"{key}: {value}" for key, value in MICRO.items())
    output = tmp_path / "killed"
    command = [
        sys.executable, "-c", PROGRAM, "pretrain", f"data={{path: {image_tree}, workers: 1}}",
        f"cache.path={tmp_path}/cache", f"student={{{micro}}}", "optim={lr: 1e-3, warmup_epochs: 0}", "epochs=15",
        "batch_size=4", "accum_iter=2", f"max_steps={STEPS}", "tensorboard=false", f"output={output}",
        *(f"{key}={value}" for key, value in every.items()),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    moments = random.Random(store)

    def start(strike: str = "") -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=ROOT, env={**environment, "STRIKE": strike}, start_new_session=True, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def went_on(from_step: int, errors: str) -> bool:
        """From the newest checkpoint, where there was one: a run that began again would end with the same weights."""
        return not from_step or f"resumed from {output}/checkpoints/step-{from_step:08d}" in errors

    for moment in MOMENTS:
        found = newest(output)
        if moment == "any":
            process = start()
            # Strike when this start has got a few steps on, at a random moment of a step or of its checkpoint.
            goal, deadline = found + moments.randint(1, 7), time.monotonic() + 120
            while newest(output) < goal and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(moments.uniform(0.0, 0.03))
            assert process.poll() is None, f"ended with {process.returncode} at step {newest(output)}"
            os.killpg(process.pid, signal.SIGKILL)
        else:
            step, micro_batch = aim(moment, found)
            process = start(f"{step}.{micro_batch}")
        _, errors = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, errors
        assert went_on(found, errors)
        if moment != "any":
            assert newest(output) == step // checkpoint_every * checkpoint_every
    found = newest(output)
    assert 0 < found < STEPS
    process = start()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert went_on(found, errors)
    whole, killed = weights(tmp_path / "whole"), weights(output)
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert losses(output) == losses(tmp_path / "whole")
    for path in (output / "checkpoints").glob("step-*"):
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            pytest.fail(f"a kill left a checkpoint that only looks whole: {error}")
