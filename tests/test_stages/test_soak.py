"""A long run of two processes that are killed, paused, starved of disk and read for slowly by turns.

Its parameters end as those of a run that nothing disturbed, bit for bit, and nothing grows: descriptors, memory,
processes, zombies, names in /dev/shm.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch

from pipeline.training.metrics import read_metrics
from stages import extract_teacher_features
from tests import forked
from tests.endings import session
from tests.failing_disk import failing
from tests.ranks import Rendezvous
from tests.test_stages.conftest import MICRO, extract_config
from tests.test_stages.test_pretrain import losses, weights

# Of two micro-batches; the second half in one go. 300 at least: a disk that fills up lets a run go on for up to 60.
STEPS = int(os.environ.get("MRMAE_SOAK_STEPS", "1500"))
CHECKPOINT_EVERY, LOG_EVERY = 20, 5
PATIENCE = 1200.0  # seconds without a step, on a machine with much else to do
GROWTH = 24 << 20  # bytes that a process may take more at the end of its steps than at their start

PROGRAM = """
import os, random, time
from pipeline.cache import files
from tests.failing_disk import install
read = files.preadv
def slow(*words):
    time.sleep(random.choice((0.05, *[0.0] * 9)))
    return read(*words)
if os.environ.get("SLOW_READS"):
    files.preadv = slow
if os.environ.get("MRMAE_FAILING_DISK"):
    install()
import cli
cli.main()
"""


class Sample(NamedTuple):
    """What a process holds."""

    descriptors: int
    bytes: int
    children: int
    zombies: int


class Ranks:
    """Two processes that train together, and what each held: early, and when it was looked at last."""

    def __init__(self, words: list[str], environments: Sequence[Mapping[str, str]]) -> None:
        self.rendezvous = Rendezvous(len(environments))
        self.processes = []
        for rank, of_rank in enumerate(environments):
            environment = {**os.environ, **of_rank, **self.rendezvous.environment(rank), "OMP_NUM_THREADS": "1"}
            self.processes.append(
                forked.Popen(
                    [sys.executable, "-c", PROGRAM, *words], env=environment, text=True,
                    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
                )
            )  # fmt: skip

    @property
    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def look(self) -> list[Sample]:
        return [_look(process.pid) for process in self.processes]

    def loaders(self, rank: int) -> list[psutil.Process]:
        return psutil.Process(self.processes[rank].pid).children()

    def end(self) -> list[tuple[int, str]]:
        """Exit code and errors of each; whatever they started has ended with them."""
        ends = [(process.wait(PATIENCE), str(process.communicate()[1])) for process in self.processes]
        deadline = time.monotonic() + 60
        while (left := [session(process.pid) for process in self.processes]) != [[], []]:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        pids = {str(process.pid) for process in self.processes}
        assert not [name for name in os.listdir("/dev/shm") if pids & set(name.split("_"))]
        return ends


def _look(pid: int) -> Sample:
    process = psutil.Process(pid)
    children = process.children(recursive=True)
    zombies = sum(child.status() == psutil.STATUS_ZOMBIE for child in children)
    return Sample(process.num_fds(), process.memory_info().rss, len(children), zombies)


class Soak:
    """The run in `output`, start by start."""

    def __init__(self, words: list[str], output: Path, seed: str) -> None:
        self.words, self.output, self.random = words, output, random.Random(seed)

    @property
    def step(self) -> int:
        """The last one that a row was written of."""
        rows = [row["step"] for row in read_metrics(self.output / "metrics.jsonl") if "loss" in row]
        return int(rows[-1]) if rows else 0

    @contextmanager
    def started(self, of_first: Mapping[str, str] | None = None) -> Iterator[Ranks]:
        """Both processes, at work; the first one with more in its environment."""
        ranks = Ranks(self.words, (of_first or {}, {}))
        try:
            yield ranks
        finally:
            for process in ranks.processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def wait(self, ranks: Ranks, goal: int) -> None:
        """Until the run has come to `goal`, and written a new row, or has ended."""
        step, deadline = self.step, time.monotonic() + PATIENCE
        goal = max(goal, step + 1)
        while ranks.running and step < goal:
            if self.step > step:
                step, deadline = self.step, time.monotonic() + PATIENCE
            assert time.monotonic() < deadline, f"no step after {step}"
            time.sleep(0.05)


def stop(ranks: Ranks, rank: int) -> None:
    """Ask for the end; both save first."""
    ranks.processes[rank].send_signal(signal.SIGTERM)
    for code, errors in ranks.end():
        assert code == 130, errors
        assert "with a checkpoint; run again to go on" in errors


def check_ends(ranks: Ranks, struck: int, code: int, line: str) -> None:
    """The struck process ended so; the other one learned of it."""
    ends = ranks.end()
    assert ends[struck][0] == code, ends[struck]
    assert line in ends[struck][1]
    assert ends[1 - struck][0] == 2, ends[1 - struck]
    last = ends[1 - struck][1].strip().splitlines()[-1]
    assert last == "error: another process of this job has ended: the line that it left says why"


def kill_one(soak: Soak, goal: int) -> None:
    with soak.started() as ranks:
        soak.wait(ranks, goal)
        struck = soak.random.randrange(2)
        ranks.processes[struck].kill()
        check_ends(ranks, struck, -signal.SIGKILL, "")


def pause_one(soak: Soak, goal: int) -> None:
    with soak.started() as ranks:
        soak.wait(ranks, goal - CHECKPOINT_EVERY)
        struck = ranks.processes[soak.random.randrange(2)]
        struck.send_signal(signal.SIGSTOP)
        time.sleep(soak.random.uniform(1, 4))
        struck.send_signal(signal.SIGCONT)
        soak.wait(ranks, goal)
        stop(ranks, soak.random.randrange(2))


def fill_the_disk(soak: Soak, goal: int) -> None:
    at = soak.random.randint(40, 90)  # a start has some ten operations, a checkpoint twenty
    with soak.started(failing(soak.output, at, "ENOSPC")) as ranks:
        soak.wait(ranks, STEPS)
        ends = ranks.end()
        assert [code for code, _ in ends] == [2, 2], ends
        assert "free some space" in ends[0][1]


def read_slowly(soak: Soak, goal: int) -> None:
    with soak.started({"SLOW_READS": "1"}) as ranks:
        soak.wait(ranks, goal)
        stop(ranks, soak.random.randrange(2))


def kill_both(soak: Soak, goal: int) -> None:
    with soak.started() as ranks:
        soak.wait(ranks, goal)
        time.sleep(soak.random.uniform(0, 0.2))
        for process in ranks.processes:
            process.kill()
        assert [code for code, _ in ranks.end()] == [-signal.SIGKILL] * 2


def kill_a_loader(soak: Soak, goal: int) -> None:
    with soak.started() as ranks:
        soak.wait(ranks, goal)
        struck = soak.random.randrange(2)
        ranks.loaders(struck)[0].kill()
        check_ends(ranks, struck, 2, "error: a process that loads data has ended (SIGKILL)")


DISTURBANCES: list[Callable[[Soak, int], None]] = [
    kill_one, pause_one, fill_the_disk, read_slowly, kill_both, kill_a_loader,
] * 2  # fmt: skip


@pytest.mark.slow  # twelve starts of two processes and thousands of steps for each store
@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_a_disturbed_run_ends_as_an_undisturbed_one_and_nothing_grows(
    image_tree: Path, tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    extract_teacher_features.run(extract_config(image_tree, tmp_path / "cache", cache__store=store))
    micro = ", ".join(f"{key}: {value}" for key, value in MICRO.items())
    words = [
        "pretrain", f"data={{path: {image_tree}, workers: 1}}", f"cache.path={tmp_path}/cache", f"student={{{micro}}}",
        "optim={lr: 1e-3, warmup_epochs: 0}", "batch_size=8", "accum_iter=2", "epochs=100000", f"max_steps={STEPS}",
        f"log_every={LOG_EVERY}", f"checkpoint_every={CHECKPOINT_EVERY}", "keep_checkpoints=2", "tensorboard=false",
    ]  # fmt: skip
    undisturbed = Soak([*words, f"output={tmp_path}/whole"], tmp_path / "whole", store)
    with undisturbed.started() as ranks:
        assert [code for code, _ in ranks.end()] == [0, 0]

    soak = Soak([*words, f"output={tmp_path}/soaked"], tmp_path / "soaked", store)
    for number, disturb in enumerate(DISTURBANCES):
        disturb(soak, (number + 1) * STEPS // (2 * len(DISTURBANCES)))
    with soak.started() as ranks:
        soak.wait(ranks, soak.step + STEPS // 10)
        early = ranks.look()
        soak.wait(ranks, STEPS - STEPS // 20)
        late = ranks.look()
        ends = ranks.end()
    assert [code for code, _ in ends] == [0, 0], ends
    whole, soaked = weights(tmp_path / "whole"), weights(tmp_path / "soaked")
    assert all(torch.equal(whole[name], soaked[name]) for name in whole)
    assert dict(losses(tmp_path / "soaked")) == pytest.approx(dict(losses(tmp_path / "whole")), rel=1e-6)
    for before, after in zip(early, late, strict=True):
        assert after.descriptors <= before.descriptors + 4  # of a file that is just being written
        assert after.bytes <= before.bytes + GROWTH
        assert (after.children, after.zombies) == (before.children, 0)
    with capsys.disabled():
        sys.stderr.write(f"{store}: {STEPS} steps, {len(DISTURBANCES)} disturbances; early {early}, late {late}\n")
