"""Commands that meet an error where they are told to: `tests/test_stages/test_endings.py` looks how they end.

    python tests/endings.py plain pretrain data.path=...     through the command line, as `mrmae pretrain ...`
    python tests/endings.py debug pretrain data.path=...     as `mrmae --debug pretrain ...`
    python tests/endings.py api pretrain data.path=...       as a script that calls `stages.pretrain.run`

STRIKE says what happens in the process of rank STRIKE_RANK: "batch" and "data" raise where batches are made, "kill"
ends the worker there, "step" raises in a training step.
"""

import importlib
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import cli
from pipeline.assembly.samples import PretrainDataset
from pipeline.config import load_config
from pipeline.data.crops import CentralCrops
from pipeline.data.labelled import LabelledDataset
from pipeline.data.rendering import ViewRenderer
from pipeline.detection import DetectionDataset
from pipeline.errors import DataError
from pipeline.segmentation import SceneCrops
from pipeline.training.engine import _Loop

CLASSES = {
    "pretrain": "PretrainConfig", "finetune": "FinetuneConfig", "detect": "DetectConfig", "knn": "KnnConfig",
    "extract-teacher-features": "ExtractConfig", "segment": "SegmentConfig", "embed": "EmbedConfig",
}  # fmt: skip


def limit() -> float:
    """Seconds that a command may take from its start to its end: 30, where each core has one process to run.

    Where more processes want a core, each gets a share of it: the limit grows with the load of the last minute.
    """
    return 30 * max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


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
    for dataset in (PretrainDataset, LabelledDataset, DetectionDataset, ViewRenderer, SceneCrops, CentralCrops):
        dataset.__getitems__ = batch  # type: ignore[attr-defined]


def main(how: str, arguments: list[str]) -> None:
    if os.environ.get("RANK", "0") == os.environ.get("STRIKE_RANK", "0"):
        strike(os.environ["STRIKE"])
    if how != "api":
        cli.main(["--debug", *arguments] if how == "debug" else arguments, prog_name="mrmae")
    command, *keys = arguments
    stage = importlib.import_module(f"stages.{command.replace('-', '_')}")
    stage.run(load_config(getattr(stage, CLASSES[command]), None, keys, command))


def session(leader: int) -> list[int]:
    """Processes of a session that are still there."""
    members = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            if int(state[3]) == leader and state[0] != "Z":
                members.append(int(folder.name))
    return members


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
