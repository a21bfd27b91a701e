"""Commands that meet an error where they are told to: `tests/test_stages/test_endings.py` looks how they end.

    python tests/endings.py plain pretrain data.path=...     through the command line, as `mrmae pretrain ...`
    python tests/endings.py debug pretrain data.path=...     as `mrmae --debug pretrain ...`
    python tests/endings.py api pretrain data.path=...       as a script that calls `stages.pretrain.run`
    python tests/endings.py serve                            forks a process with all imports done for each job it reads

STRIKE says what happens in the process of rank STRIKE_RANK: "batch" and "data" raise where batches are made, "kill"
ends the worker there, "step" raises in a training step.
"""

import importlib
import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import cli
from pipeline.assembly.samples import PretrainDataset
from pipeline.config import load_config
from pipeline.data.labelled import LabelledDataset
from pipeline.data.rendering import ViewRenderer
from pipeline.detection import DetectionDataset
from pipeline.errors import DataError
from pipeline.training.engine import _Loop
from stages import detect, extract_teacher_features, finetune, knn, pretrain  # noqa: F401 - imported before a fork

CLASSES = {
    "pretrain": "PretrainConfig", "finetune": "FinetuneConfig", "detect": "DetectConfig", "knn": "KnnConfig",
    "extract-teacher-features": "ExtractConfig",
}  # fmt: skip
LIMIT = 60.0  # seconds that a command may take from its start to its end, on a machine that does other work beside it


def strike(what: str) -> None:
    """Let the first batch that any process makes, or the second step, fail."""

    def batch(*_: Any) -> None:
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise DataError("image 7: unreadable; repair it") if what == "data" else ValueError("a broken augmentation")

    if what == "step":
        backward, steps = _Loop._backward, list[int]()

        def step(loop: Any, *rest: Any) -> None:
            if steps:
                raise ValueError("a broken loss")
            steps.append(1)
            backward(loop, *rest)

        _Loop._backward = step  # type: ignore[method-assign]
        return
    for dataset in (PretrainDataset, LabelledDataset, DetectionDataset, ViewRenderer):
        dataset.__getitems__ = batch  # type: ignore[attr-defined]


def main(how: str, arguments: list[str]) -> None:
    if os.environ.get("RANK", "0") == os.environ.get("STRIKE_RANK", "0"):
        strike(os.environ["STRIKE"])
    if how != "api":
        cli.main(["--debug", *arguments] if how == "debug" else arguments, prog_name="mrmae")
    command, *keys = arguments
    stage = importlib.import_module(f"stages.{command.replace('-', '_')}")
    stage.run(load_config(getattr(stage, CLASSES[command]), None, keys, command))


def serve() -> list[str] | None:
    """For each line, a list of jobs: run them side by side, say how they ended. Returns its arguments in a job."""
    for line in sys.stdin:
        running: dict[int, float] = {}
        for job in json.loads(line):
            pid = os.fork()
            if not pid:
                os.setsid()
                os.environ.update(job["environment"])
                for number in (1, 2):
                    os.dup2(os.open(f"{job['output']}.{number}", os.O_WRONLY | os.O_CREAT), number)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                return [job["how"], *job["arguments"]]
            running[pid] = time.monotonic()
        ended = [wait(pid, began) for pid, began in running.items()]
        sys.stdout.write(json.dumps(ended) + "\n")
        sys.stdout.flush()
    return None


def wait(pid: int, began: float) -> dict[str, Any]:
    while time.monotonic() < began + LIMIT:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return {"pid": pid, "code": os.waitstatus_to_exitcode(status), "left": session(pid)}
        time.sleep(0.005)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return {"pid": pid, "code": "still running", "left": []}


def session(leader: int) -> list[int]:
    """Processes of a session that are still there, a moment after its leader has ended."""
    time.sleep(0.2)
    members = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            if int(state[3]) == leader and state[0] != "Z":
                members.append(int(folder.name))
    return members


if __name__ == "__main__":
    chosen = serve() if sys.argv[1] == "serve" else sys.argv[1:]
    if chosen is not None:
        main(chosen[0], chosen[1:])
