"""`mrmae benchmark gpu`: what this machine's GPU reaches, in eight minutes, on images that it draws itself. JSON.

    mrmae benchmark gpu
    mrmae benchmark gpu minutes=20 batch_size=512 folder=/fast/disk

Nothing comes from the network: teachers have random weights. The parts, the more important ones first:

    extract      the teacher's bare forward; the whole of stage 1, its start in it; its steady state (the last two
                 thirds); each in views/s
    steps        MAE, MR-MAE from a cache, MR-MAE with a live teacher, by turns: images/s with the loader and without,
                 the loader alone, the share of waiting, mfu, the most memory
    sparse       ConvViT's convolution stages on visible cells, over those on whole maps

Each part says a line as soon as it is done. What no longer fits into `minutes` is named as skipped; a part that fails,
as for want of memory, or takes too long ends alone. A signal ends the rest: what was found by then is still printed.
"""

import gc
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field

from benchmarks import extract as benchmark_extract
from benchmarks import pretrain as benchmark_pretrain
from benchmarks import student as benchmark_student
from pipeline.assembly.extraction import Extractor
from pipeline.cache import create_cache, open_writer
from pipeline.config import Config, PathField
from pipeline.data.drawn import draw_images
from pipeline.data.images import ImageSource, open_images
from pipeline.data.views import ViewConfig
from pipeline.models.student_config import StudentConfig
from pipeline.ownership import stage
from pipeline.teachers.teacher_config import TeacherConfig
from pipeline.training.flops import peak_tflops

log = logging.getLogger(__name__)

_RESERVE = 5.0  # seconds at the end, to leave in good order
_BYTES_A_VIEW = 200_000  # of a cache, with room to spare
_SHARD = 512  # samples


class BenchmarkGpuConfig(Config):
    """What is measured. The defaults are meant for one H100 or H200; smaller sizes run anywhere, a CPU too."""

    minutes: float = Field(8, gt=0)
    patience: float = Field(3, ge=1)  # a part may take so many times what it takes on an H100
    students: list[StudentConfig] = Field(
        default=[
            StudentConfig(name="mrmae_vit_base_patch16"),
            StudentConfig(name="mrmae_convvit_base_patch16"),
            StudentConfig(name="mrmae_vit_large_patch16"),
        ]
    )
    teachers: list[TeacherConfig] = Field(  # students mimic the first one
        default=[
            TeacherConfig(spec="clip_vitb16", weights="random"),
            TeacherConfig(spec="timm:vit_large_patch16_dinov3", weights="random"),
        ],
        min_length=1,
    )
    sparse: list[str] = Field(default=["mrmae_convvit_base_patch16"])  # whose sparse path is held against the dense one
    image_size: int = Field(224, ge=32)  # of what is drawn, and of the views
    images: int = Field(1024, ge=16)  # that are drawn
    copies: int = Field(64, ge=1)  # links to each of them, for extraction
    store: Literal["zarr", "webdataset"] = "webdataset"
    batch_size: int = Field(256, ge=2)  # of students and teachers
    sparse_batch_size: int = Field(128, ge=1)
    seconds: float = Field(6, gt=0)  # that extraction is to last at the rate of the bare forward
    rounds: int = Field(3, ge=3)  # by turns, after one that warms up
    steps: int = Field(8, ge=1)  # of each lane in a round
    compile: bool = True  # measure compiled steps as well
    workers: int | None = Field(None, ge=0)  # decoding processes; default: the cores but two, 16 at most
    folder: PathField | None = None  # for images and caches; the system's temporary folder when left out


class _Enough(BaseException):
    """A part's time is over, or a signal came. No Exception, or a library might take it for a fault of its own."""


class _Part(NamedTuple):
    name: str
    seconds: float  # that it takes on an H100, with room
    run: Callable[[], dict[str, Any]]


@stage
def run(config: BenchmarkGpuConfig) -> dict[str, Any]:
    """Measure as much as fits; returns the figures as JSON-able values: by part, or why there are none."""
    end = time.monotonic() + 60 * config.minutes - _RESERVE
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    figures: dict[str, Any] = {
        "device": card,
        "peak_tflops": peak_tflops(card),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "config": config.model_dump(mode="json"),
        "parts": {},
        "skipped": [],
        "failed": {},
    }
    began = time.monotonic()
    with _stopped_by_signals(figures), tempfile.TemporaryDirectory(prefix="mrmae-gpu-", dir=config.folder) as name:
        bench = _Bench(config, device, Path(name))
        for part in _parts(bench):
            _measure(part, end, config.patience, figures)
    figures["seconds"] = round(time.monotonic() - began, 1)
    return figures


def _parts(bench: "_Bench") -> list[_Part]:
    config = bench.config

    def steps(student: StudentConfig, compiled: bool) -> _Part:
        how, seconds = ("compiled", 90) if compiled else ("eager", 30)
        return _Part(f"steps {student.name} {how}", seconds, partial(bench.steps, student, compiled))

    def sparse(name: str, compiled: bool) -> _Part:
        how, seconds = ("compiled", 90) if compiled else ("eager", 15)
        return _Part(f"sparse {name} {how}", seconds, partial(bench.sparse, name, compiled))

    extract = [_Part(f"extract {one.spec}", 35, partial(bench.extract, one)) for one in config.teachers]
    eager = [steps(student, False) for student in config.students]
    compiled = [steps(student, True) for student in config.students] if config.compile else []
    paths = [sparse(name, False) for name in config.sparse]
    last = [sparse(name, True) for name in config.sparse] if config.compile else []
    return [*extract[:1], *eager[:1], *compiled[:1], *paths, *extract[1:], *eager[1:], *compiled[1:], *last]


def _measure(part: _Part, end: float, patience: float, figures: dict[str, Any]) -> None:
    """Run a part if it still fits; what becomes of it goes into `figures`."""
    left = end - time.monotonic()
    if left < part.seconds:
        figures["skipped"].append(part.name)
        log.info("%s: skipped, %.0f s are left", part.name, max(left, 0))
        return
    began = time.monotonic()
    try:
        with _limit(min(left, patience * part.seconds)):
            found = part.run()
    except _Enough as error:
        if "stopped" in figures:
            raise
        figures["failed"][part.name] = str(error)
    except Exception as error:  # noqa: BLE001 - out of memory, or what a library refuses: the other parts go on
        figures["failed"][part.name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    else:
        figures["parts"][part.name] = found | {"seconds": round(time.monotonic() - began, 1)}
    said = figures["failed"].get(part.name) or _short(found)
    log.info("%s: %s (%.0f s)", part.name, said, time.monotonic() - began)
    gc.collect()  # networks and loaders of the part
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raise _Enough inside after so many seconds."""

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise _Enough(f"stopped after {seconds:.0f} s")

    former = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


@contextmanager
def _stopped_by_signals(figures: dict[str, Any]) -> Iterator[None]:
    """SIGTERM and ctrl-C leave the block early and are told in `figures`."""

    def stop(number: int, _frame: FrameType | None) -> None:
        if "stopped" not in figures:  # a second one would cut off the leaving
            figures["stopped"] = signal.Signals(number).name
            raise _Enough("stopped by a signal")

    former = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except _Enough:
        log.info("stopped by %s", figures["stopped"])
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _short(found: dict[str, Any]) -> str:
    """The plain numbers of a part, and those one level down."""
    numbers: list[str] = []
    for name, value in found.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        numbers += [f"{name} {key} {one:.4g}".replace("  ", " ") for key, one in inner if isinstance(one, int | float)]
    return ", ".join(numbers)


class _Bench:
    """The images, and what each kind of part measures on them."""

    def __init__(self, config: BenchmarkGpuConfig, device: torch.device, folder: Path) -> None:
        self.config, self.device, self.folder = config, device, folder
        self.workers = min(16, max(1, (os.cpu_count() or 1) - 2)) if config.workers is None else config.workers
        self.views = ViewConfig(image_size=config.image_size)
        began = time.monotonic()
        self.few = draw_images(folder / "drawn", config.images, config.image_size)
        log.info("drew %d images (%.0f s)", len(self.few), time.monotonic() - began)

    def extract(self, teacher: TeacherConfig) -> dict[str, Any]:
        """Views/s of stage 1 and of its teacher alone."""
        config = self.config
        chosen = benchmark_extract.BenchmarkExtractConfig(
            teacher=teacher, views=self.views, store=config.store, batch_size=config.batch_size
        )
        bench = benchmark_extract._Bench(chosen, self._many(), self.device, self.folder)
        bench.total = 8 * config.batch_size
        bench._bare_forward()
        bare = max(bench.total / bench._bare_forward() for _ in range(3))
        room = shutil.disk_usage(self.folder).free // 2 // _BYTES_A_VIEW
        shards = max(3, min(round(bare * config.seconds), len(bench.source), room) // _SHARD)
        done: list[tuple[float, int]] = []
        extractor = Extractor(bench.source, self.views, [bench.teacher], config.batch_size, self.workers, config.store)
        state = extractor.calibrate("int8", 16)[0].to_json()
        path = self.folder / "extracted"
        create_cache(path, extractor.describe("mean", min(_SHARD, len(bench.source) // 3), [state])[0])
        writer = open_writer(path)
        shards = min(shards, writer.header.shards)
        began = time.perf_counter()

        def tick(images: int) -> None:
            done.append((time.perf_counter(), images + (done[-1][1] if done else 0)))

        try:
            summary = extractor.run([writer], range(shards), benchmark_extract.NO_BOUNDS, tick)
            whole = summary.images / (time.perf_counter() - began)
        finally:
            shutil.rmtree(path)
        return {
            "bare_views_per_s": round(bare),
            "stage_views_per_s": round(whole),
            "steady_views_per_s": round(_steady(done)),
            "views": summary.images,
            "workers": self.workers,
            "teacher_gmacs": round(bench.teacher.gmacs, 2),
        }

    def steps(self, student: StudentConfig, compiled: bool) -> dict[str, Any]:
        """The three lanes of a student, with the first teacher."""
        config = self.config
        chosen = benchmark_pretrain.BenchmarkPretrainConfig(
            images=len(self.few), student=student, teachers=config.teachers[:1], store=config.store,
            batch_size=config.batch_size, compile=compiled, workers=self.workers, rounds=config.rounds,
            steps=config.steps,
        )  # fmt: skip
        return benchmark_pretrain._Bench(chosen, self.few, self.folder, self.device).measure(0)

    def sparse(self, name: str, compiled: bool) -> dict[str, Any]:
        """ConvViT's two paths, forward and backward."""
        config = self.config
        chosen = benchmark_student.BenchmarkStudentConfig(
            batch_size=config.sparse_batch_size, image_size=config.image_size, peak_memory=self.device.type == "cuda"
        )
        return benchmark_student._compare(chosen, name, self.device, compiled)

    def _many(self) -> ImageSource:
        """Each drawn image under several names: listed as so many images, at the price of links."""
        folder = self.folder / "linked"
        if not folder.exists():
            folder.mkdir()
            for file in sorted((self.folder / "drawn").iterdir()):
                for copy in range(self.config.copies):
                    os.link(file, folder / f"{copy:04d}-{file.name}")
        return open_images(str(folder))


def _steady(done: list[tuple[float, int]]) -> float:
    """Views/s from the first third on, by (seconds, views so far)."""
    start = next(entry for entry in done if entry[1] >= done[-1][1] / 3)
    return (done[-1][1] - start[1]) / max(done[-1][0] - start[0], 1e-9)
