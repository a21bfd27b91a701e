"""Training steps of students; ConvViT sparse against dense.

    mrmae benchmark student threads=2
    mrmae benchmark student 'students=[mrmae_vit_base_patch16,mrmae_convvit_base_patch16]' batch_size=256

`encoder` is the encoder alone, `step` the whole model with its decoder and losses; each forward and backward, on noise,
without optimiser and data loading. ConvViT has two lanes: `sparse` computes visible cells alone, `dense` whole maps.
`speedup` is the dense lane's time over the sparse one's.

Reads and writes nothing. Costs minutes on a CPU.
"""

import logging
import multiprocessing
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.configs.student import BenchmarkStudentConfig
from benchmarks.harness import Bench, by_turns, open_bench
from pipeline.data.masks import visible_count
from pipeline.models import ConvViT, build_student

TEACHER = "teacher"

log = logging.getLogger(__name__)


def run(config: BenchmarkStudentConfig) -> dict[str, Any]:
    """Measure every student; returns JSON-able figures: seconds, images/s, MiB.

    Raises:
        ConfigError: device=cuda without one; an unknown student.
    """
    with open_bench(config.device, threads=config.threads) as bench:
        students: dict[str, Any] = {}
        for name in config.students:
            students[name] = {"eager": measure_student(config, name, bench, compiled=False)}
            if config.compile:
                students[name]["compiled"] = measure_student(config, name, bench, compiled=True)
        return bench.report(config, {"students": students})


def measure_student(config: BenchmarkStudentConfig, name: str, bench: Bench, compiled: bool) -> dict[str, Any]:
    """Seconds and images/s of the encoder and of the step; for ConvViT the sparse path's speed-up."""
    passes = _Passes(config, name, bench, compiled)
    figures: dict[str, Any] = {}
    for part in ("encoder", "step"):
        rounds = by_turns(bench.lanes({path: partial(passes, part, path) for path in passes.paths}), config.rounds)
        figures[part] = {
            path: {"seconds": round(rounds.median(path), 4), "images_per_s": round(rate, 2)}
            for path, rate in rounds.rates(config.batch_size).items()
        }
        for path, rate in rounds.rates(config.batch_size).items():
            how = "compiled" if compiled else "eager"
            log.info("%s %s, %s %s: %.1f images/s", name, how, part, path, rate)
        if "dense" in passes.paths:
            speed = rounds.ratio("dense", "sparse")
            figures[part] |= {"speedup": speed["ratio"], "speedup_range": speed["range"]}
    if config.peak_memory and (bench.on_gpu or not compiled):
        for path in passes.paths:
            figures["step"][path]["peak_memory_mib"] = _peak_memory(config, name, bench, passes, path)
    return figures


class _Passes:
    """One student on one batch of noise: a call runs a part of it, forward and backward."""

    def __init__(self, config: BenchmarkStudentConfig, name: str, bench: Bench, compiled: bool) -> None:
        torch.manual_seed(config.seed)
        teachers, device = {TEACHER: config.teacher_dim}, bench.device
        self.bench = bench
        self.student = build_student(name, image_size=config.image_size, teachers=teachers).to(device)
        patches = self.student.grid[0] * self.student.grid[1]
        keep = visible_count(patches, config.mask_ratio)
        self.images = torch.randn(config.batch_size, 3, config.image_size, config.image_size, device=device)
        self.ids_keep = torch.rand(config.batch_size, patches, device=device).argsort(1)[:, :keep]
        self.targets = {TEACHER: torch.randn(config.batch_size, keep, config.teacher_dim, device=device)}
        self.paths = ("sparse", "dense") if isinstance(self.student.encoder, ConvViT) else ("visible",)
        self._forward = {"encoder": self._encoder_loss, "step": self._step_loss}
        if compiled:
            torch.compiler.reset()
            self._forward = {part: torch.compile(forward) for part, forward in self._forward.items()}

    def __call__(self, part: str, path: str) -> None:
        """Forward and backward of the encoder or the step, ConvViT's masked stages on the given path."""
        if isinstance(self.student.encoder, ConvViT):
            self.student.encoder.sparse = path == "sparse"
        self.student.zero_grad()
        with self.bench.autocast():
            loss = self._forward[part]()
        loss.backward()

    def _encoder_loss(self) -> Tensor:
        return self.student.encoder(self.images, self.ids_keep).latent.float().abs().mean()  # type: ignore[no-any-return]

    def _step_loss(self) -> Tensor:
        return self.student(self.images, self.ids_keep, self.targets)["loss"]  # type: ignore[no-any-return]


def _peak_memory(config: BenchmarkStudentConfig, name: str, bench: Bench, passes: _Passes, path: str) -> int:
    """MiB at the step's peak, weights and gradients included: allocated on CUDA, resident in a process on a CPU."""
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
        passes("step", path)
        return torch.cuda.max_memory_allocated() >> 20
    # A process never lowers its high-water mark, so each path needs a fresh process.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_resident_peak, config, name, bench, path).result()


def _resident_peak(config: BenchmarkStudentConfig, name: str, bench: Bench, path: str) -> int:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    _Passes(config, name, bench, compiled=False)("step", path)
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, where ru_maxrss would count the parent's peak too: it survives fork and exec
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) >> 10  # KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)  # bytes on macOS, KiB elsewhere
