"""Metrics: one JSON object a line in metrics.jsonl, the same numbers in TensorBoard. Plots read the JSONL alone."""

import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.files import append_line, write_text


class MetricsWriter:
    """Appends to `metrics.jsonl`, if it `writes`. On resume, lines of steps that will be trained again are dropped.

    Raises:
        CheckpointError: a line of the run so far is no JSON.
    """

    def __init__(self, path: Path, resume_step: int, writes: bool = True) -> None:
        self._path, self._writes = path, writes
        try:
            former = [row for row in read_metrics(path) if row["step"] <= resume_step] if resume_step else []
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}): take the bad line out to go on") from error
        if writes:
            text = "".join(json.dumps(row) + "\n" for row in former)
            write_text(path, text, durable=True)  # a kill here must not cost the rows so far
        self.latest = {key: value for row in former for key, value in row.items() if key != "step"}
        # A row of losses has a learning rate; one without it is what an evaluation found.
        self._evaluated = {row["step"] for row in former if "lr" not in row}

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        if self._writes:
            # Durable: a checkpoint counts on the rows before it.
            append_line(self._path, json.dumps({"step": step, **values}), durable=True)

    def was_evaluated(self, step: int) -> bool:
        """Whether the run so far holds an evaluation at this step."""
        return step in self._evaluated


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a kill cut short is left out."""
    return [json.loads(line) for line in _lines(path)]


class Meter:
    """What the next row will say, kept on the device so that reading it is the only synchronisation.

    The losses of a micro-batch go in as one vector: a step of a small student is as long as its launches take.
    Checkpoints hold it as plain numbers: a run that stopped between two rows goes on in the middle of a mean.
    """

    def __init__(self, device: torch.device, kept: Mapping[str, Any] | None = None) -> None:
        kept = kept or {}
        self.count: int = kept.get("count", 0)  # micro-batches
        names = tuple(sorted(kept.get("sums", {})))
        sums = [kept["sums"][name] for name in names]
        self._sums = {names: torch.tensor(sums, device=device)} if names else {}  # sorted names → over micro-batches
        self.norms = {  # the latest of each
            name: torch.tensor(value, device=device) for name, value in kept.get("norms", {}).items()
        }
        self._finite = torch.zeros((), dtype=torch.int64, device=device)  # micro-batches before the first bad loss
        self._counted = 0  # micro-batches, those of rows that were taken among them

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Count the scalars of one micro-batch, "loss" among them."""
        names = tuple(sorted(name for name, value in losses.items() if value.ndim == 0))
        values = torch.stack([losses[name].detach().float() for name in names])
        total = self._sums.get(names)
        self._sums[names] = values if total is None else total.add_(values)
        loss = self._sums[names][names.index("loss")]
        self._finite.add_(loss - loss == 0)  # a sum that is infinite or no number stays so
        self.count += 1
        self._counted += 1

    def first_bad(self) -> int | None:
        """Which micro-batch, counted from the first `add` on, had the first loss that isn't finite. It synchronises."""
        finite = int(self._finite)
        return finite if finite < self._counted else None

    @property
    def sums(self) -> dict[str, Tensor]:
        """Of each loss over the micro-batches since the last take."""
        sums: dict[str, Tensor] = {}
        for names, totals in self._sums.items():
            for name, total in zip(names, totals, strict=True):
                sums[name] = sums[name] + total if name in sums else total
        return sums

    def take(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(means of the losses, norms) since the last take, by name."""
        means, norms = {name: total / self.count for name, total in self.sums.items()}, self.norms
        self.count, self._sums, self.norms = 0, {}, {}
        return means, norms


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on an accelerator, or that this process had in memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class Stopwatch:
    """Splits the wall time of some steps into waiting for data and the rest; `saved`: seconds of checkpoints beside."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.started, self.waited, self.saved, self.steps = time.perf_counter(), 0.0, 0.0, 0

    def leave_out(self, seconds: float) -> None:
        """Forget so much time: an evaluation or a checkpoint is no training."""
        self.started += seconds

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    @property
    def wait_share(self) -> float:
        return self.waited / max(self.elapsed, 1e-9)


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
