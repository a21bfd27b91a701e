"""What all benchmarks share: lanes by turns, paired ratios, the device, the machine, the images, a temporary folder.

A lane is a function that does its work once and returns the seconds that it took. The lanes of a comparison take turns
in one process, so other work on the machine meets all of them. A ratio is taken within each round; the median over the
rounds counts, and the range shows the spread.
"""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipeline.assembly.teachers import teacher_dtype
from pipeline.config import Config
from pipeline.configs.data import DataConfig
from pipeline.data.drawn import draw_images
from pipeline.data.images import ImageSource, open_images
from pipeline.errors import ConfigError
from pipeline.flop_counting import flop_counter
from pipeline.training.flops import peak_tflops

Lane = Callable[[], float]
_LIBRARIES = ("torchvision", "timm", "numpy", "pillow", "simplejpeg", "awscrt", "google-crc32c", "zarr", "webdataset")


@dataclass(frozen=True)
class Rounds:
    """Seconds of each lane, by round: the times of one round belong together."""

    seconds: dict[str, list[float]]

    def median(self, lane: str) -> float:
        return statistics.median(self.seconds[lane])

    def rates(self, amount: float) -> dict[str, float]:
        """Lane → `amount` divided by the lane's median seconds."""
        return {lane: amount / self.median(lane) for lane in self.seconds}

    def ratio(self, above: str, below: str) -> dict[str, Any]:
        """Median and range of the rounds' own ratios of two lanes' seconds."""
        pairs = zip(self.seconds[above], self.seconds[below], strict=True)
        median, spread = median_and_range([numerator / denominator for numerator, denominator in pairs])
        return {"ratio": median, "range": spread}


def by_turns(lanes: Mapping[str, Lane], rounds: int) -> Rounds:
    """Run each lane once to warm up, then `rounds` times by turns."""
    for lane in lanes.values():
        lane()
    taken = [{name: lane() for name, lane in lanes.items()} for _ in range(rounds)]
    return Rounds({name: [seconds[name] for seconds in taken] for name in lanes})


def median_and_range(values: Sequence[float]) -> tuple[float, list[float]]:
    """Median and [lowest, highest], to three decimals."""
    return round(statistics.median(values), 3), [round(min(values), 3), round(max(values), 3)]


@dataclass(frozen=True)
class Bench:
    """Where a benchmark measures: a device, the dtype of autocast there (fp32: none), a folder that will be deleted."""

    device: torch.device
    dtype: torch.dtype
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def card(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.on_gpu else "cpu"

    def seconds(self, job: Callable[[], object]) -> float:
        """Seconds of a job, what it starts on the device included."""
        self.synchronise()
        began = time.perf_counter()
        job()
        self.synchronise()
        return time.perf_counter() - began

    def lanes(self, jobs: Mapping[str, Callable[[], object]]) -> dict[str, Lane]:
        """Jobs as lanes for `by_turns`."""
        return {name: partial(self.seconds, job) for name, job in jobs.items()}

    def synchronise(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def report(self, config: Config, figures: Mapping[str, Any]) -> dict[str, Any]:
        """The figures behind the machine and the config, JSON-able. Call it while the bench is open."""
        machine = {
            "device": self.card,
            "peak_tflops": peak_tflops(self.card),
            "precision": {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype],
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "libraries": {"torch": torch.__version__} | {library: version(library) for library in _LIBRARIES},
        }
        return {"machine": machine, "config": config.model_dump(mode="json"), **figures}


@contextmanager
def open_bench(
    device: str = "auto", precision: str = "auto", threads: int | None = None, folder: Path | None = None
) -> Iterator[Bench]:
    """A place to measure.

    Args:
        device: "cpu", "cuda", or "auto": CUDA where there is one.
        precision: "fp32", "bf16", or "auto": bf16 on CUDA, fp32 on a CPU.
        threads: CPU threads of torch inside the block; torch's choice when None.
        folder: where the temporary folder is made; the system's place when None.

    Raises:
        ConfigError: device=cuda without one; bf16 on a CPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no CUDA device here: use device=cpu")
    chosen = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    dtype = teacher_dtype(precision, chosen)
    former = torch.get_num_threads()
    torch.set_num_threads(threads or former)
    try:
        with tempfile.TemporaryDirectory(prefix="mrmae-benchmark-", dir=folder) as temporary:
            yield Bench(chosen, dtype, Path(temporary))
    finally:
        torch.set_num_threads(former)


def open_or_draw(data: DataConfig | None, count: int, folder: Path, image_size: int = 224) -> ImageSource:
    """At most `count` images of data.path; without `data`, as many drawn ones in a new `folder`."""
    if data is None:
        return draw_images(folder, count, image_size)
    return open_images(data.path, min(count, data.limit or count))


def count_gmacs(job: Callable[[], object]) -> float:
    """Multiply-adds of a job in billions, operation by operation by torch's counter; the job runs for real."""
    with flop_counter() as counter:
        job()
    return float(counter.get_total_flops()) / 2e9
