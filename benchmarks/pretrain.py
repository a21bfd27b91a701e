"""`mrmae benchmark pretrain`: what a teacher costs in a step, from a cache and live, against MAE without any. JSON.

    mrmae benchmark pretrain
    mrmae benchmark pretrain data.path=/data/imagenet/train student.name=mrmae_vit_base_patch16 batch_size=256 \\
        teachers=[{spec: clip_vitb16},{spec: clip_vitl14}] workers=16 steps=20 compile=true

For each teacher, three lanes with the same student, batch and images take turns in one process:

    mae      plain MAE                                 cached / mae, time of a step: what mimicking costs (aim: ≤ 1.05)
    cached   MR-MAE, targets from a cache              online / cached: what the cache saves
    online   MR-MAE, the teacher's forward in the step

`ceiling` is online / cached as the multiply-accumulates would have it: (student + teacher) / student, the student's
forward and backward counted operation by operation. `ceiling_measured` puts measured seconds of a step and of the
teacher's forward in their place. `loader` is the loading side alone, `step` the training side alone. For a webdataset
cache, whose views are stored, the loader is also held against decoding the same JPEGs in a bare loop, inside this
process and in a worker (aim: ≥ 0.8).
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch.utils.flop_counter import FlopCounterMode

from pipeline.assembly.extraction import Extractor
from pipeline.assembly.knowledge import CachedKnowledge, Knowledge, LiveKnowledge, Targets
from pipeline.assembly.samples import PretrainBatch, PretrainDataset
from pipeline.assembly.teachers import load_teacher, teacher_dtype
from pipeline.cache import CacheReader, create_cache, open_cache, open_writer
from pipeline.config import Config, PathField
from pipeline.data.decoding import decode_pixels
from pipeline.data.drawn import draw_images
from pipeline.data.images import DataConfig, ImageSource, open_images
from pipeline.data.loader import Samples
from pipeline.data.masks import Focus, MaskSampler, visible_count
from pipeline.data.order import EpochOrder
from pipeline.data.views import ViewConfig
from pipeline.data.workers import PREFETCH
from pipeline.models import Student, build_student
from pipeline.models.student_config import StudentConfig
from pipeline.ownership import stage
from pipeline.pixels import normalise
from pipeline.steps import StepPlan
from pipeline.teachers import Teacher
from pipeline.teachers.teacher_config import TeacherConfig
from pipeline.training.flops import peak_tflops
from pipeline.training.optim import OptimConfig, build_adamw, parameter_groups

FOREVER = 2**40  # steps


class BenchmarkPretrainConfig(Config):
    """What is measured. The defaults take about eight minutes of two cores."""

    data: DataConfig | None = None  # images; drawn ones of 224 x 224 when left out
    images: int = Field(128, ge=16)  # of the dataset; they come round again
    student: StudentConfig = StudentConfig(name="mrmae_vit_tiny_patch16")
    teachers: list[TeacherConfig] = Field(
        default=[
            TeacherConfig(spec="timm:vit_tiny_patch16_224", weights="random"),
            TeacherConfig(spec="timm:vit_base_patch16_224", weights="random"),
        ],
        min_length=1,
    )
    store: Literal["zarr", "webdataset"] = "zarr"
    batch_size: int = Field(32, ge=2)
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on CUDA, fp32 on CPUs
    compile: bool = False  # torch.compile students and teachers
    workers: int = Field(0, ge=0)  # decoding processes a lane; 0 puts a lane's loading into its own time
    rounds: int = Field(21, ge=3)  # after one that warms up; medians over the rounds' own ratios
    steps: int = Field(1, ge=1)  # of each lane in a round
    threads: int | None = Field(default=None, gt=0)  # CPU threads; torch's choice unless given
    folder: PathField | None = None  # where the caches go; the system's temporary folder when left out
    seed: int = 0


@stage
def run(config: BenchmarkPretrainConfig) -> dict[str, Any]:
    """Measure; returns the figures as JSON-able values.

    Raises:
        DataError, TeacherError, ConfigError: as extraction and pre-training themselves.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="mrmae-benchmark-", dir=config.folder) as name:
        folder = Path(name)
        if config.data is None:
            source = draw_images(folder / "images", config.images, config.student.image_size)
        else:
            source = open_images(config.data.path, min(config.images, config.data.limit or config.images))
        bench = _Bench(config, source, folder, device)
        teachers = {str(number): bench.measure(number) for number in range(len(config.teachers))}
        loader = bench.stored_views()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": str(bench.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "config": config.model_dump(mode="json"),
        "teachers": teachers,
        "stored_views": loader,
    }


class _Bench:
    """One student's shape, one dataset, a cache a teacher."""

    def __init__(
        self, config: BenchmarkPretrainConfig, source: ImageSource, folder: Path, device: torch.device
    ) -> None:
        self.config, self.source, self.folder, self.device = config, source, folder, device
        self.dtype = teacher_dtype(config.precision, device)
        self.views = ViewConfig(image_size=config.student.image_size)

    def measure(self, number: int) -> dict[str, Any]:
        """The three lanes of one teacher, by turns."""
        config = self.config
        choice = config.teachers[number].model_copy(update={"compile": config.compile})
        teacher = load_teacher(choice, self.device, self.dtype)
        cache = self._extract(teacher, config.store, f"{number}-{config.store}")
        lanes = {
            "mae": self._lane("mae", self._live({})),
            "cached": self._lane("mr_mae", self._cached(cache)),
            "online": self._lane("mr_mae", self._live({"t": teacher})),
        }
        seconds = _by_turns({name: lane.train for name, lane in lanes.items()}, config.rounds)
        alone = _by_turns({name: lane.train_again for name, lane in lanes.items()}, max(3, config.rounds // 3))
        loading = _by_turns({name: lane.load for name, lane in lanes.items()}, max(3, config.rounds // 3))
        images = config.batch_size * config.steps
        gmacs = lanes["cached"].gmacs_per_image()
        flops = {"mae": 2e9 * lanes["mae"].gmacs_per_image(), "cached": 2e9 * gmacs}
        flops["online"] = flops["cached"] + 2e9 * teacher.gmacs
        view = torch.zeros(config.batch_size, 3, *(2 * [self.views.image_size]), dtype=torch.uint8, device=self.device)
        forward = statistics.median(_timed(lambda: teacher(view), self.device) for _ in range(4))
        step = statistics.median(alone["cached"]) / config.steps
        return {
            "teacher": teacher.spec,
            "images_per_s": {name: images / statistics.median(times) for name, times in seconds.items()},
            "cached_over_mae": _ratio(seconds["cached"], seconds["mae"]),
            "online_over_cached": _ratio(seconds["online"], seconds["cached"]),
            "ceiling": round((gmacs + teacher.gmacs) / gmacs, 3),
            "ceiling_measured": round((step + forward) / step, 3),
            "student_step_gmacs": round(gmacs, 3),
            "teacher_gmacs": round(teacher.gmacs, 3),
            "step": {
                "images_per_s": {name: images / statistics.median(times) for name, times in alone.items()},
                "cached_over_mae": _ratio(alone["cached"], alone["mae"]),
                "online_over_cached": _ratio(alone["online"], alone["cached"]),
            },
            "loader_images_per_s": {name: images / statistics.median(times) for name, times in loading.items()},
            "data_wait": {name: round(lane.waited / lane.elapsed, 4) for name, lane in lanes.items()},
            **self._of_the_card({name: images / statistics.median(times) for name, times in seconds.items()}, flops),
            **self._memory(lanes),
        }

    def _of_the_card(self, rates: dict[str, float], flops: dict[str, float]) -> dict[str, Any]:
        """mfu of each lane, on a card whose rate is known."""
        tflops = peak_tflops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        if tflops is None:
            return {}
        return {"mfu": {name: round(rate * flops[name] / tflops / 1e12, 4) for name, rate in rates.items()}}

    def _memory(self, lanes: dict[str, "_Lane"]) -> dict[str, Any]:
        if self.device.type != "cuda":
            return {}
        return {"peak_memory_gib": {name: round(lane.peak_memory() / 2**30, 2) for name, lane in lanes.items()}}

    def stored_views(self) -> dict[str, Any]:
        """The loader over a webdataset cache of the first teacher, against decoding its JPEGs in this process.

        `loader` makes its batches in this process, `worker` in one other: what a core gives in training.
        """
        teacher = load_teacher(self.config.teachers[0], self.device, self.dtype)
        cache = self._extract(teacher, "webdataset", "stored")
        lane = self._lane("mr_mae", self._cached(cache), workers=0)
        dataset = self._dataset(lane.student, self._cached(cache))
        count = self.config.batch_size * self.config.steps
        images = cycle([cache.read(index, 0).image or b"" for index in range(len(cache))])

        out = np.empty((*(2 * [self.views.image_size]), 3), np.uint8)

        def bare() -> float:
            began = time.perf_counter()
            for image in islice(images, count):
                decode_pixels(image, out)
            return time.perf_counter() - began

        def worker() -> float:
            # A worker makes batches ahead, so it is started for the measurement alone, and what it had ahead is not
            # counted. Then it is at work all the time, and a batch is taken as soon as it is there.
            with closing(self._samples(dataset, workers=1)) as batches:
                for _ in range(2 * PREFETCH):
                    next(batches)
                began, few = time.perf_counter(), max(self.config.steps, 2 * PREFETCH)
                for _ in range(few):
                    next(batches).to(self.device)
                return (time.perf_counter() - began) * self.config.steps / few

        seconds = _by_turns({"bare": bare, "loader": lane.load, "worker": worker}, max(11, self.config.rounds))
        rates = {f"{name}_images_per_s": count / statistics.median(times) for name, times in seconds.items()}
        return {
            "loader_over_bare_decoding": _ratio(seconds["bare"], seconds["loader"]),
            "worker_over_bare_decoding": _ratio(seconds["bare"], seconds["worker"]),
        } | rates

    def _extract(self, teacher: Teacher, store: str, name: str) -> CacheReader:
        """Made once in a folder, of whatever is there under that name by now."""
        if (self.folder / name).exists():
            return open_cache(self.folder / name)
        extractor = Extractor(self.source, self.views, [teacher], self.config.batch_size, 0, store)
        state = extractor.calibrate("int8", 16)[0].to_json()
        create_cache(self.folder / name, extractor.describe("mean", 64, [state])[0])
        writer = open_writer(self.folder / name)
        extractor.run([writer], range(writer.header.shards), {"max_nmse": float("inf"), "min_cosine": 0.0})
        return open_cache(self.folder / name)

    def _lane(self, objective: str, knowledge: Knowledge, workers: int | None = None) -> "_Lane":
        config = self.config
        torch.manual_seed(config.seed)
        student = build_student(
            **config.student.model_dump(exclude_none=True), objective=objective, teachers=knowledge.dims or None
        )
        dataset = self._dataset(student, knowledge)
        batches = self._samples(dataset, config.workers if workers is None else workers)
        targets = knowledge.targets(dataset)
        if config.compile:
            student.compile()
        return _Lane(student.to(self.device), targets, batches, self.device, self.dtype, config.steps)

    def _live(self, teachers: dict[str, Teacher]) -> LiveKnowledge:
        return LiveKnowledge(teachers, self.source, self.views)

    def _cached(self, cache: CacheReader) -> CachedKnowledge:
        source = None if cache.stores_images else self.source
        return CachedKnowledge({"t": cache}, source, self.views, np.arange(len(self.source)))

    def _dataset(self, student: Student, knowledge: Knowledge) -> PretrainDataset:
        patches = student.grid[0] * student.grid[1]
        focus: Focus = "sampled" if knowledge.dims else "random"
        masks = MaskSampler(patches, visible_count(patches, self.config.mask_ratio), focus, self.config.seed)
        return knowledge.dataset(masks, student.target_rows)

    def _samples(self, dataset: PretrainDataset, workers: int) -> Generator[PretrainBatch, None, None]:
        order = EpochOrder(np.arange(len(self.source)), self.config.seed, "full", 64, 16)
        plan = StepPlan(len(order) // self.config.batch_size, FOREVER, self.config.batch_size, 1, 1)
        return Samples(dataset, order, workers).batches(plan, 0)


class _Lane:
    """One way to train: a student, its batches, and the seconds that `steps` steps of it take."""

    def __init__(
        self,
        student: Student,
        targets: Targets,
        batches: Iterator[PretrainBatch],
        device: torch.device,
        dtype: torch.dtype,
        steps: int,
    ) -> None:
        self.student, self.targets, self.batches = student, targets, batches
        self.device, self.dtype, self.steps = device, dtype, steps
        optim = OptimConfig(lr=1e-4)
        self.optimizer = build_adamw(parameter_groups(student, optim.weight_decay), optim)
        self.waited, self.elapsed = 0.0, 0.0  # in `train`
        self.last = next(self.batches).to(device)

    def train(self) -> float:
        """Seconds of loading and training, as a run does both: a batch is copied ahead of its step."""

        def steps() -> None:
            for _ in range(self.steps):
                began = time.perf_counter()
                batch, self.last = self.last, next(self.batches).to(self.device)
                self.waited += time.perf_counter() - began
                self._step(batch)

        seconds = _timed(steps, self.device)
        self.elapsed += seconds
        return seconds

    def train_again(self) -> float:
        """Seconds of training alone, on a batch that is there."""

        def steps() -> None:
            for _ in range(self.steps):
                self._step(self.last)

        return _timed(steps, self.device)

    def load(self) -> float:
        """Seconds of loading alone."""
        return _timed(lambda: [next(self.batches).to(self.device) for _ in range(self.steps)], self.device)

    def gmacs_per_image(self) -> float:
        """Multiply-accumulates of a forward and a backward, in billions, without the teacher."""
        ids_keep, targets = self.targets(self.last)
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            self.student(normalise(self.last.images), ids_keep, targets)["loss"].backward()
        self.optimizer.zero_grad(set_to_none=True)
        return float(counter.get_total_flops()) / 2e9 / len(self.last.images)

    def peak_memory(self) -> int:
        """Bytes at a step's peak on CUDA, what the other lanes hold left out."""
        weights = [*self.student.parameters(), *self.student.buffers()]
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        own: int = sum(value.numel() * value.element_size() for value in [*weights, *moments])
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.train_again()
        peak: int = torch.cuda.max_memory_allocated(self.device) - before + own
        return peak

    def _step(self, batch: PretrainBatch) -> None:
        ids_keep, targets = self.targets(batch)
        autocast = nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)
        with autocast:
            losses = self.student(normalise(batch.images), ids_keep, targets)
        losses["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _timed(job: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    job()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _by_turns(jobs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    for job in jobs.values():
        job()
    taken = [{name: job() for name, job in jobs.items()} for _ in range(rounds)]
    return {name: [times[name] for times in taken] for name in jobs}


def _ratio(above: list[float], below: list[float]) -> dict[str, Any]:
    """Median and range of the rounds' own ratios."""
    ratios = [one / other for one, other in zip(above, below, strict=True)]
    return {"ratio": round(statistics.median(ratios), 3), "range": [round(min(ratios), 3), round(max(ratios), 3)]}
