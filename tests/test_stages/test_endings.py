"""An error ends the process: wherever it is met, however the stage was started, with nothing left running."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pytest

from stages import extract_teacher_features
from tests import forked
from tests.coco import write_coco
from tests.endings import CLASSES, limit, session
from tests.ranks import Rendezvous
from tests.test_stages.conftest import ENCODER, MICRO, extract_config

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "tests.endings"]
PROGRAM_CODE = "import sys; from tests.endings import main; main(sys.argv[1], sys.argv[2:])"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
LINES = {
    "batch": "error: unexpected ValueError: a broken augmentation (mrmae --debug ... shows where)",
    "data": "error: image 7: unreadable; repair it",
    "kill": "error: a process that loads data has ended (SIGKILL): where memory is full, the kernel kills it",
    "step": "error: unexpected ValueError: a broken loss (mrmae --debug ... shows where)",
}
Command = Callable[[str, int], list[str]]


@pytest.fixture(scope="module")
def command(image_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """(stage, workers) → the arguments of a short run with a fresh output."""
    root = tmp_path_factory.mktemp("endings")
    extract_teacher_features.run(extract_config(image_tree, root / "cache"))
    folder, file = write_coco(root / "coco")
    runs = iter(range(10**6))

    def shape(model: dict[str, Any]) -> str:
        return f"student={{{', '.join(f'{key}: {value}' for key, value in model.items())}}}"

    def arguments(stage: str, workers: int) -> list[str]:
        output = root / str(next(runs))
        images = f"{{path: {image_tree}, workers: {workers}}}"
        training = ["max_steps=4", "log_every=1", "tensorboard=false"]
        scenes, labelled = f"{{images: {folder}, annotations: {file}}}", f"{{images: {folder}, labels: {file}}}"
        keys = {
            "pretrain": [shape(MICRO), f"data={images}", f"cache.path={root}/cache", "batch_size=8", *training],
            "finetune": [shape(ENCODER), f"data={images}", f"val={images}", "batch_size=8", *training],
            "detect": [
                "student={name: mrmae_vit_tiny_patch16, patch_size: 8, dim: 48, depth: 2, num_heads: 3}",
                f"data={{train: {scenes}, val: {scenes}, workers: {workers}}}", "image_size=64",
                "detector={window: 4, channels: 16, anchors: [8, 16, 24, 32, 48], rois: 16}", *training,
                "batch_size=4",
            ],
            "segment": [
                shape(ENCODER), f"data={{train: {labelled}, val: {labelled}, workers: {workers}}}", *training,
                "batch_size=4",
            ],
            "embed": [shape(ENCODER), f"data={images}"],
            "knn": [shape(ENCODER), f"data={images}", f"val={images}"],
            "extract-teacher-features": [
                f"data={images}", "teacher={spec: timm:test_vit, weights: random, image_size: 64}",
                "views={count: 2, image_size: 64}", "batch_size=16",
                f"cache={{path: {output}, samples_per_shard: 8, quantiser: float16}}",
            ],
        }[stage]  # fmt: skip
        if "extract" in stage:
            return [stage, *keys]
        return [stage, *keys, f"output={output}{'.npz' if stage == 'embed' else ''}"]

    return arguments


def end(tmp_path: Path, how: str, what: str, arguments: list[list[str]]) -> list[tuple[int, str]]:
    """Start one process for each list of arguments, side by side; exit codes and what they wrote to standard error."""
    rendezvous = Rendezvous(len(arguments))
    processes = []
    for rank, of_rank in enumerate(arguments):
        environment = {**ENVIRONMENT, "STRIKE": what, "STRIKE_RANK": str(len(arguments) - 1)}
        if len(arguments) > 1:
            environment |= rendezvous.environment(rank)
        with open(tmp_path / f"{rank}.errors", "w") as errors:
            command = [sys.executable, "-c", PROGRAM_CODE, how, *of_rank]
            keys: dict[str, Any] = {"cwd": ROOT, "env": environment, "start_new_session": True}
            processes.append(forked.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, **keys))
    deadline = time.monotonic() + limit()
    try:
        codes = [process.wait(max(0.0, deadline - time.monotonic())) for process in processes]
        time.sleep(0.2)  # what they started may need a moment
        assert [session(process.pid) for process in processes] == [[] for _ in processes]
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return [(code, (tmp_path / f"{rank}.errors").read_text()) for rank, code in enumerate(codes)]


ALWAYS = {("pretrain", "debug", 2), ("pretrain", "api", 2), ("finetune", "plain", 0)}


@pytest.mark.parametrize(
    ("stage", "how", "workers"),
    [
        pytest.param(stage, how, workers, marks=() if fast else pytest.mark.slow)
        for stage, how, workers in product(CLASSES, ("plain", "debug", "api"), (0, 2))
        for fast in [(how, workers) == ("plain", 2) or (stage, how, workers) in ALWAYS]
    ],
)
def test_an_error_where_batches_are_made_ends_the_process(
    command: Command, tmp_path: Path, stage: str, how: str, workers: int
) -> None:
    ((code, errors),) = end(tmp_path, how, "batch", [command(stage, workers)])
    assert code == (1 if how == "api" else 2), errors
    assert ("Traceback" in errors) == (how != "plain"), errors
    assert ("in a process that loads data:" in errors) == (how != "plain" and workers > 0)
    last = errors.strip().splitlines()[-1]
    if how != "api":
        assert last == LINES["batch"]


@pytest.mark.parametrize(
    ("stage", "what", "how"),
    [("finetune", "data", "plain"), ("pretrain", "kill", "plain"), ("pretrain", "step", "api")],
)
def test_other_ends_are_said_too(command: Command, tmp_path: Path, stage: str, what: str, how: str) -> None:
    ((code, errors),) = end(tmp_path, how, what, [command(stage, 2)])
    assert code == (1 if how == "api" else 2), errors
    assert LINES[what].removeprefix("error: ").removeprefix("unexpected ").split(" (mrmae")[0] in errors
    if how == "plain":
        assert errors.strip().splitlines()[-1].startswith(LINES[what])


@pytest.mark.parametrize(
    ("stage", "what", "how"),
    [
        ("pretrain", "step", "plain"), ("extract-teacher-features", "batch", "plain"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (
            ("pretrain", "batch", "plain"), ("pretrain", "kill", "api"), ("finetune", "batch", "debug"),
            ("detect", "batch", "api"),
        )),
    ],
)  # fmt: skip
def test_processes_that_wait_for_a_failed_one_end_with_it(
    command: Command, tmp_path: Path, stage: str, what: str, how: str
) -> None:
    arguments = command(stage, 2)
    (first, waiting), (second, failed) = end(tmp_path, how, what, [arguments, arguments])
    assert (first, second) == ((1, 1) if how == "api" else (2, 2)), waiting + failed
    assert LINES[what].removeprefix("error: ").removeprefix("unexpected ").split(" (mrmae")[0] in failed
    if how == "plain":
        assert "error: another process of this job has ended: the line that it left says why" in waiting


@pytest.mark.slow  # starts Python and torch up to twice for each of sixty commands
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("how", ["plain", "debug", "api"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stage", CLASSES)
def test_the_launcher_learns_of_an_error(command: Command, stage: str, workers: int, how: str, processes: int) -> None:
    before = set(os.listdir("/dev/shm"))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    program = [*PROGRAM[:1], *launcher, *PROGRAM[1:]] if processes > 1 else PROGRAM
    environment = {**ENVIRONMENT, "STRIKE": "batch", "STRIKE_RANK": str(processes - 1)}
    process = subprocess.Popen(
        [*program, how, *command(stage, workers)], cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    seen: set[psutil.Process] = set()
    began = time.monotonic()
    try:
        while process.poll() is None and time.monotonic() < began + limit():
            seen |= set(descendants(process.pid))
            time.sleep(0.02)
        assert process.poll() == (1 if processes > 1 or how == "api" else 2)
    finally:
        for one in seen:
            if one.is_running():
                one.kill()
        process.kill()
        _, errors = process.communicate()
    assert "a broken augmentation" in errors
    assert not [one for one in seen if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    pids = {str(one.pid) for one in seen} | {str(process.pid)}
    assert not [name for name in set(os.listdir("/dev/shm")) - before if pids & set(name.split("_"))]


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
