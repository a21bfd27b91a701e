"""Metrics: one JSON object a line in metrics.jsonl, the same numbers in TensorBoard. Plots read the JSONL alone."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class MetricsWriter:
    """Appends to `metrics.jsonl`. On resume, lines of steps that will be trained again are dropped."""

    def __init__(self, path: Path, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _lines(path) if _step(line) <= resume_step] if resume_step else []
        path.write_text("".join(kept), encoding="utf-8")
        self._path = path

    def write(self, step: int, values: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a kill cut short is left out."""
    return [json.loads(line) for line in _lines(path)]


class LossMeter:
    """Sums of losses, kept on the device so that reading them is the only synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self._sums: dict[str, Tensor] = {}
        self._device = device
        self.steps = 0

    def add(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            if value.ndim == 0:
                zero = torch.zeros((), device=self._device)
                self._sums[name] = self._sums.get(name, zero) + value.detach().float()

    def take(self) -> dict[str, Tensor]:
        """Sums since the last take, by name."""
        sums, self._sums = self._sums, {}
        self.steps = 0
        return sums


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on an accelerator, or that this process had in memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class Stopwatch:
    """Splits wall time into waiting for data and the rest."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.started, self.waited = time.perf_counter(), 0.0

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


def _step(line: str) -> int:
    return int(json.loads(line)["step"])
