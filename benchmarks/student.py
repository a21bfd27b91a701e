"""How fast a student trains, and what skipping the masked cells saves: `mrmae benchmark student`.

    mrmae benchmark student threads=2
    mrmae benchmark student students=[mrmae_vit_base_patch16,mrmae_convvit_base_patch16] batch_size=256

For ConvViT the sparse and the dense path of the convolution stages are timed forward and backward, by turns in one
process, so that whatever else the machine does meets both; the speed-up is the median over the rounds' own ratios.
`encoder` is the encoder alone, `step` the whole model with its decoder and losses. No optimiser, no data loading.
"""

import logging
import multiprocessing
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config import Config
from pipeline.data.masks import visible_count
from pipeline.errors import ConfigError
from pipeline.models import ConvViT, build_student

TEACHER = "teacher"

log = logging.getLogger(__name__)


class BenchmarkStudentConfig(Config):
    """What to time, and how often."""

    students: list[str] = Field(default=["mrmae_convvit_base_patch16"], min_length=1)
    batch_size: int = Field(default=8, gt=0)
    image_size: int = Field(default=224, gt=0)
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    teacher_dim: int = Field(default=768, gt=0)  # channels of the mimicked tokens
    rounds: int = Field(default=5, gt=0)  # after one that warms up
    device: Literal["auto", "cpu", "cuda"] = "auto"  # bf16 on CUDA, fp32 on a CPU
    threads: int | None = Field(default=None, gt=0)  # CPU threads; torch's choice unless given
    compile: bool = False  # time torch.compile as well
    peak_memory: bool = True  # on a CPU each path then runs once more, in a process of its own
    seed: int = 0


def run(config: BenchmarkStudentConfig) -> dict[str, Any]:
    """Time every student; returns the figures as JSON-able values: seconds, images/s, MiB.

    Raises:
        ConfigError: device=cuda without one; an unknown student.
    """
    device = _device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    students: dict[str, Any] = {}
    for name in config.students:
        students[name] = {"eager": _compare(config, name, device, compiled=False)}
        if config.compile:
            students[name]["compiled"] = _compare(config, name, device, compiled=True)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": "bf16" if device.type == "cuda" else "fp32",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch_size": config.batch_size,
        "students": students,
    }


def _compare(config: BenchmarkStudentConfig, name: str, device: torch.device, compiled: bool) -> dict[str, Any]:
    """Seconds, images/s and, for ConvViT, the sparse path's speed-up; of the encoder alone and of the step."""
    bench = _Bench(config, name, device, compiled)
    figures: dict[str, Any] = {}
    for part in ("encoder", "step"):
        seconds: dict[str, list[float]] = {path: [] for path in bench.paths}
        for round_ in range(config.rounds + 1):
            for path in bench.paths:
                elapsed = bench.time(part, path)
                if round_:  # the first warms up, and compiles
                    seconds[path].append(elapsed)
        figures[part] = {path: _rates(config, times) for path, times in seconds.items()}
        for path, rates in figures[part].items():
            how = "compiled" if compiled else "eager"
            log.info("%s %s, %s %s: %.1f images/s", name, how, part, path, rates["images_per_s"])
        if len(seconds) == 2:
            ratios = [dense / sparse for sparse, dense in zip(seconds["sparse"], seconds["dense"], strict=True)]
            figures[part]["speedup"] = round(statistics.median(ratios), 3)
            figures[part]["speedup_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    if config.peak_memory and not (compiled and device.type == "cpu"):
        for path in bench.paths:
            figures["step"][path]["peak_memory_mib"] = _peak_memory(config, bench, path)
    return figures


class _Bench:
    """One student on one batch of noise, and its parts as calls that run forward and backward."""

    def __init__(self, config: BenchmarkStudentConfig, name: str, device: torch.device, compiled: bool) -> None:
        torch.manual_seed(config.seed)
        self.name, self.device = name, device
        self.student = build_student(name, image_size=config.image_size, teachers={TEACHER: config.teacher_dim}).to(
            device
        )
        length = self.student.grid[0] * self.student.grid[1]
        keep = visible_count(length, config.mask_ratio)
        self.images = torch.randn(config.batch_size, 3, config.image_size, config.image_size, device=device)
        self.ids_keep = torch.rand(config.batch_size, length, device=device).argsort(1)[:, :keep]
        self.targets = {TEACHER: torch.randn(config.batch_size, keep, config.teacher_dim, device=device)}
        self.paths = ("sparse", "dense") if isinstance(self.student.encoder, ConvViT) else ("visible",)
        self._forward = {"encoder": self._encoder_loss, "step": self._step_loss}
        if compiled:
            torch.compiler.reset()
            self._forward = {part: torch.compile(forward) for part, forward in self._forward.items()}

    def time(self, part: str, path: str) -> float:
        """Seconds of one forward and backward."""
        self._synchronise()
        start = time.perf_counter()
        self.pass_once(part, path)
        self._synchronise()
        return time.perf_counter() - start

    def pass_once(self, part: str, path: str) -> None:
        """Forward and backward of a part, ConvViT's masked stages on the given path."""
        if isinstance(self.student.encoder, ConvViT):
            self.student.encoder.sparse = path == "sparse"
        self.student.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self._forward[part]()
        loss.backward()

    def _encoder_loss(self) -> Tensor:
        return self.student.encoder(self.images, self.ids_keep).latent.float().abs().mean()  # type: ignore[no-any-return]

    def _step_loss(self) -> Tensor:
        return self.student(self.images, self.ids_keep, self.targets)["loss"]  # type: ignore[no-any-return]

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _rates(config: BenchmarkStudentConfig, times: list[float]) -> dict[str, float]:
    seconds = statistics.median(times)
    return {"seconds": round(seconds, 4), "images_per_s": round(config.batch_size / seconds, 2)}


def _peak_memory(config: BenchmarkStudentConfig, bench: _Bench, path: str) -> int:
    """MiB at the step's peak, weights and gradients included: allocated on CUDA, resident in a process on a CPU."""
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        bench.pass_once("step", path)
        return torch.cuda.max_memory_allocated() >> 20
    # A process never lowers its high-water mark: each path needs a fresh one.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_resident_peak, config, bench.name, path).result()


def _resident_peak(config: BenchmarkStudentConfig, name: str, path: str) -> int:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    _Bench(config, name, torch.device("cpu"), compiled=False).pass_once("step", path)
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, where ru_maxrss would count the parent's peak too: it survives fork and exec
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) >> 10  # KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)  # bytes there, KiB elsewhere


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no CUDA device here: use device=cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
