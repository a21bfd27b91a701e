"""`mrmae benchmark extract`: how close the whole of stage 1 comes to the teacher's bare forward. JSON; paired ratios.

    mrmae benchmark extract
    mrmae benchmark extract data.path=/data/imagenet/train teacher.spec=clip_vitb16 batch_size=256 data.workers=16

    stage    images on disk → finished cache, against the network alone on normalised views in memory (aim: 0.9)
    render   one decoding process's views/s, by `views.interpolation`: times `data.workers`, the ceiling that images on
             disk put to the stage
    free     the stage with views and tokens at hand, decoding, forward and quantisation taken away: what filling
             and writing shards of 196 x 768 int8 tokens allow, in each store (`folder=/dev/shm` leaves the disk out)
    shared   two token choices of the teacher in one pass, against two passes (aim: below 0.6 of their time)
    bf16     LayerNorm-space cosine of the tokens, and total variation of the attention, against fp32

Every round times each side once, by turns. Calibration and the making of the cache are left out; starting the decode
workers, filling the pipeline and the last commit are in.
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity, layer_norm

from pipeline.assembly.extraction import Extractor
from pipeline.assembly.filling import PendingTargets, StoredTargets
from pipeline.assembly.teachers import load_teacher, teacher_dtype
from pipeline.cache import CacheHeader, Fidelity, Quantiser, create_cache, open_writer
from pipeline.config import Config, PathField
from pipeline.data.drawn import draw_images
from pipeline.data.images import DataConfig, ImageSource, open_images
from pipeline.data.rendering import RenderedViews, ViewRenderer, preprocessing
from pipeline.data.views import ViewConfig
from pipeline.ownership import stage
from pipeline.teachers import Teacher
from pipeline.teachers.teacher_config import TeacherConfig

RANDOM_TEACHER = TeacherConfig(spec="timm:vit_tiny_patch16_224", weights="random")
NO_BOUNDS = {"max_nmse": float("inf"), "min_cosine": 0.0}
FREE_SHARDS = 8  # memory is fresh in the first two or three alone
GRID, DIM = (14, 14), 768  # of a ViT-B/16's tokens


class BenchmarkExtractConfig(Config):
    """What is measured. The defaults take about three minutes of two cores."""

    data: DataConfig | None = None  # images; drawn ones of 224 x 224 when left out
    workers: int = Field(2, ge=0)  # decoding processes, for drawn images
    teacher: TeacherConfig | None = None  # a ViT-Ti of random weights when left out
    views: ViewConfig = ViewConfig()
    store: Literal["zarr", "webdataset"] = "zarr"
    images: int = Field(512, ge=16)  # that each round takes
    batch_size: int = Field(64, ge=1)  # views per forward pass
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    free_views: int = Field(8192, ge=FREE_SHARDS)  # that each round with a free forward writes: 0.15 MB each
    rounds: int = Field(5, ge=1)  # after one that warms up; the median counts
    threads: int | None = Field(default=None, gt=0)  # CPU threads of the forward; torch's choice unless given
    folder: PathField | None = None  # where the caches go; the system's temporary folder when left out


@stage
def run(config: BenchmarkExtractConfig) -> dict[str, Any]:
    """Measure; returns the figures as JSON-able values.

    Raises:
        DataError, TeacherError, ConfigError: as extraction itself.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="mrmae-benchmark-", dir=config.folder) as name:
        source = _source(config, Path(name) / "images")
        bench = _Bench(config, source, device, Path(name))
        figures = bench.free() | bench.render() | bench.stage() | {"shared": bench.shared(), "bf16": bench.reduced()}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "config": config.model_dump(mode="json"),
        **figures,
    }


class _Bench:
    """One teacher, one set of images, and views of theirs in memory."""

    def __init__(
        self, config: BenchmarkExtractConfig, source: ImageSource, device: torch.device, scratch: Path
    ) -> None:
        self.config, self.source, self.device, self.scratch = config, source, device, scratch
        self.dtype = teacher_dtype(config.precision, device)
        self.choice = config.teacher or RANDOM_TEACHER
        self.teacher = self._teacher(self.choice)
        self.jpeg = config.store == "webdataset"
        samples = [(0, index) for index in range(max(1, config.batch_size // config.views.count))]
        renderer = ViewRenderer(source, config.views, self.jpeg)
        self.views = renderer.__getitems__(samples).readable_pixels().to(device)
        self.total = len(source) * config.views.count

    def stage(self) -> dict[str, Any]:
        """Views/s of the stage and of the bare forward, and the stage's share of the bare."""
        times = self._by_turns({"bare": self._bare_forward, "stage": lambda: self._extract([self.teacher])})
        ratios = [bare / whole for bare, whole in zip(times["bare"], times["stage"], strict=True)]
        return {"stage": _spread(ratios) | self._rates(times, self.total)}

    def shared(self) -> dict[str, Any]:
        """Time of two token choices in one pass, over that of two passes."""
        choices = [self.choice, self.choice.model_copy(update={"tokens": "block", "layers": 2})]
        # Built twice: teachers that go through one pass together share one network from then on.
        together, apart = ([self._teacher(choice) for choice in choices] for _ in range(2))
        times = self._by_turns(
            {
                "together": lambda: self._extract(together),
                "apart": lambda: sum(self._extract([teacher]) for teacher in apart),
            }
        )
        return _spread([one / two for one, two in zip(times["together"], times["apart"], strict=True)])

    def reduced(self) -> dict[str, float]:
        """How far bf16 autocast takes tokens and attention from fp32, on one batch."""
        exact, rough = (
            load_teacher(self.choice, self.device, dtype)(self.views) for dtype in (torch.float32, torch.bfloat16)
        )
        dim = (exact.tokens.shape[-1],)
        cosine = cosine_similarity(layer_norm(exact.tokens, dim), layer_norm(rough.tokens, dim), dim=-1)
        figures = {"cosine_mean": float(cosine.mean()), "cosine_worst": float(cosine.min())}
        if exact.attention is not None and rough.attention is not None:
            figures["attention_distance"] = float((exact.attention - rough.attention).abs().sum(-1).mean() / 2)
        return figures

    def _teacher(self, config: TeacherConfig) -> Teacher:
        return load_teacher(config, self.device, self.dtype)

    def _extract(self, teachers: list[Teacher]) -> float:
        """Seconds of extracting all images, calibration left out."""
        config = self.config
        workers = config.data.workers if config.data is not None else config.workers
        extractor = Extractor(self.source, config.views, teachers, config.batch_size, workers, config.store)
        quantisers = [quantiser.to_json() for quantiser in extractor.calibrate("int8", 16)]
        headers = extractor.describe("mean", max(1, len(self.source) // 4), quantisers)
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            paths = [Path(folder) / str(number) for number in range(len(teachers))]
            for path, header in zip(paths, headers, strict=True):
                create_cache(path, header)
            writers = [open_writer(path) for path in paths]
            began = time.perf_counter()
            extractor.run(writers, range(headers[0].shards), NO_BOUNDS)
            return time.perf_counter() - began

    def _bare_forward(self) -> float:
        """Seconds of the network alone for as many views as the stage takes."""
        model: Any = self.teacher.model
        forward: Callable[[Tensor], Any] = getattr(model, "forward_tokens", model)  # our encoders', or the library's
        if self.teacher.compiled:
            forward = torch.compile(forward)
        autocast = nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)
        pixels = self.teacher.prepare(self.views)
        with torch.no_grad(), autocast:
            self._synchronise()
            began = time.perf_counter()
            for at in range(0, self.total, len(pixels)):
                forward(pixels[: self.total - at])
            self._synchronise()
            return time.perf_counter() - began

    def render(self) -> dict[str, Any]:
        """Views/s of one process for reading, decoding and rendering, by interpolation; torch's time over Pillow's."""
        jobs = {
            kind: ViewRenderer(self.source, self.config.views.model_copy(update={"interpolation": kind}), self.jpeg)
            for kind in ("pillow", "torch")
        }
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker
        times = self._by_turns({kind: functools.partial(self._render, job) for kind, job in jobs.items()})
        torch.set_num_threads(threads)
        ratios = [new / old for new, old in zip(times["torch"], times["pillow"], strict=True)]
        return {"render": _spread(ratios) | self._rates(times, self.total)}

    def _render(self, renderer: ViewRenderer) -> float:
        began = time.perf_counter()
        for index in range(len(self.source)):
            renderer.__getitems__([(0, index)])
        return time.perf_counter() - began

    def free(self) -> dict[str, Any]:
        """Views/s of filling and writing shards, whatever the teacher, and of the main thread's own seconds."""
        figures = {}
        for store in ("zarr", "webdataset"):
            job = _FreeForward.over(self.source, self.config, store)
            rounds = [job.seconds(self.scratch) for _ in range(self.config.rounds + 1)][1:]
            count = len(job.source) * self.config.views.count
            whole, main = (statistics.median(times) for times in zip(*rounds, strict=True))
            figures[store] = {"views_per_s": round(count / whole), "main_thread_views_per_s": round(count / main)}
        return {"free": figures}

    def _by_turns(self, jobs: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
        for job in jobs.values():
            job()
        rounds = [{name: job() for name, job in jobs.items()} for _ in range(self.config.rounds)]
        return {name: [times[name] for times in rounds] for name in jobs}

    @staticmethod
    def _rates(times: dict[str, list[float]], views: int) -> dict[str, float]:
        return {f"{name}_views_per_s": views / statistics.median(seconds) for name, seconds in times.items()}

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _FreeForward(Extractor):
    """Extraction whose views are rendered, and whose targets are on the host, before it begins."""

    header: CacheHeader
    ready: dict[int, tuple[RenderedViews, list[StoredTargets]]]

    @classmethod
    def over(cls, source: ImageSource, config: BenchmarkExtractConfig, store: str) -> "_FreeForward":
        """Over so many samples as have `free_views` views: the images of `source`, again and again."""
        per_shard = max(1, config.free_views // config.views.count // FREE_SHARDS)
        many = source.select(np.arange(per_shard * FREE_SHARDS) % len(source))
        made = cls(many, config.views, [], config.batch_size, 0, store)
        made.ready = {}
        made.header = CacheHeader.model_validate(
            {
                "store": store,
                "dataset": {"source": "", "kind": "flat", "count": len(many), "digest": many.digest()},
                "preprocessing": preprocessing(config.views, store),
                "views": config.views.model_dump(mode="json"),
                "teacher": {"name": "free", "grid": list(GRID), "dim": DIM},
                "quantiser": Quantiser.calibrate("int8", torch.randn(16, GRID[0] * GRID[1], DIM)).to_json(),
                "samples_per_shard": per_shard,
            }
        )
        return made

    def seconds(self, scratch: Path) -> tuple[float, float]:
        """Of writing one cache: on the clock, and of this thread's own work."""
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            path = Path(folder) / "cache"
            create_cache(path, self.header)
            began, busy = time.perf_counter(), time.thread_time()
            self.run([open_writer(path)], range(self.header.shards), NO_BOUNDS)
            return time.perf_counter() - began, time.thread_time() - busy

    def batches(self, chunks: Iterable[Sequence[int]], views: ViewConfig) -> Iterator[RenderedViews]:
        for chunk in chunks:
            yield replace(self._ready(len(chunk))[0], indices=list(chunk))

    def start(self, batch: RenderedViews, headers: Sequence[CacheHeader]) -> PendingTargets:
        return PendingTargets(batch, self._ready(len(batch.indices))[1], None)

    def _ready(self, samples: int) -> tuple[RenderedViews, list[StoredTargets]]:
        """So many samples rendered, and tokens for them; made once."""
        if samples not in self.ready:
            self.ready[samples] = self._make(samples)
        return self.ready[samples]

    def _make(self, samples: int) -> tuple[RenderedViews, list[StoredTargets]]:
        renderer = ViewRenderer(self.source, self.views, self.store == "webdataset")
        batch = renderer.__getitems__([(0, index) for index in range(samples)])
        tokens = torch.randn(samples * self.views.count, self.header.tokens, DIM)
        stored, scale = self.header.quantiser.quantise(tokens)
        fidelity = Fidelity()
        fidelity.update(tokens[:1], self.header.quantiser.dequantise(stored[:1], None if scale is None else scale[:1]))
        return batch, [StoredTargets(stored, scale, torch.rand(tokens.shape[:2]).half(), fidelity)]


def _spread(ratios: list[float]) -> dict[str, Any]:
    return {"ratio": round(statistics.median(ratios), 3), "range": [round(min(ratios), 3), round(max(ratios), 3)]}


def _source(config: BenchmarkExtractConfig, folder: Path) -> ImageSource:
    if config.data is None:
        return draw_images(folder, config.images)
    return open_images(config.data.path, min(config.images, config.data.limit or config.images))
