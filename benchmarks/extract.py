"""Extraction against the teacher's bare forward.

    mrmae benchmark extract
    mrmae benchmark extract data.path=/data/imagenet/train teacher.spec=clip_vitb16 batch_size=256 data.workers=16

    stage    images on disk to finished cache, over the network alone on views in memory, in views/s (aim: 0.9).
             The start of the decode workers and the last commit count, calibration does not. `steady` is the rate
             of the last two thirds.
    render   views/s of one decoding process, by views.interpolation: times data.workers, the ceiling of the stage.
    free     views/s of the stage with views and tokens at hand: what filling and writing shards allow in each store
             (folder=/dev/shm leaves the disk out). It depends on the teacher's grid and width.
    shared   time of two token choices of the teacher in one pass, over two passes (aim: 0.6).
    bf16     LayerNorm-space cosine of the tokens and total variation of the attention, against fp32.

Reads images (data.path) or draws some; writes caches into a temporary folder. Costs minutes on a CPU.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, layer_norm

from benchmarks.configs.extract import BenchmarkExtractConfig
from benchmarks.extraction_lanes import FreeForward, bare_forward, write_caches
from benchmarks.harness import Bench, by_turns, open_bench, open_or_draw
from pipeline.assembly.extraction import Extractor
from pipeline.assembly.teachers import load_teacher
from pipeline.configs.teachers import TeacherConfig
from pipeline.data.images import ImageSource
from pipeline.data.rendering import ViewRenderer
from pipeline.ownership import stage
from pipeline.teachers import Teacher


@stage
def run(config: BenchmarkExtractConfig) -> dict[str, Any]:
    """Measure; returns the figures as JSON-able values.

    Raises:
        DataError, TeacherError, ConfigError: as extraction itself.
    """
    with open_bench(precision=config.precision, threads=config.threads, folder=config.folder) as bench:
        source = open_or_draw(config.data, config.images, bench.folder / "images")
        choice = config.teacher or TeacherConfig(spec="timm:vit_tiny_patch16_224", weights="random")
        teacher = load_teacher(choice, bench.device, bench.dtype)
        figures = {
            "free": _measure_free(config, source, teacher, bench),
            "render": _measure_rendering(config, source, bench),
            "stage": measure_stage(config, source, teacher, bench),
            "shared": _measure_shared(config, source, choice, bench),
            "bf16": _measure_bf16(choice, render_batch(config, source, bench), bench),
        }
        return bench.report(config, figures)


def render_batch(config: BenchmarkExtractConfig, source: ImageSource, bench: Bench) -> Tensor:
    """Views of one forward pass on the device, uint8 [V, 3, S, S]."""
    count = min(len(source), max(1, config.batch_size // config.views.count))
    samples = [(0, index) for index in range(count)]
    renderer = ViewRenderer(source, config.views, config.store == "webdataset")
    return renderer.__getitems__(samples).readable_pixels().to(bench.device)


def measure_stage(
    config: BenchmarkExtractConfig, source: ImageSource, teacher: Teacher, bench: Bench
) -> dict[str, Any]:
    """The bare forward's time over the stage's, views/s of both, and of the last two thirds of the stage."""
    count, total = config.views.count, len(source) * config.views.count
    bare = bare_forward(teacher, render_batch(config, source, bench), total, bench)
    ticks: list[tuple[float, int]] = []  # of one round: time, views so far

    def progress(images: int) -> None:
        ticks.append((time.perf_counter(), images * count + (ticks[-1][1] if ticks else 0)))

    def extract() -> float:
        ticks.clear()
        return _extract(config, source, [teacher], bench, progress)

    rounds = by_turns({"bare": partial(bench.seconds, bare), "stage": extract}, config.rounds)
    began, before = next(tick for tick in ticks if tick[1] >= total / 3)
    ended, views = ticks[-1]
    steady = (views - before) / max(ended - began, 1e-9)
    return rounds.ratio("bare", "stage") | _views_per_s(rounds.rates(total) | {"steady": steady})


def _measure_shared(
    config: BenchmarkExtractConfig, source: ImageSource, choice: TeacherConfig, bench: Bench
) -> dict[str, Any]:
    choices = [choice, choice.model_copy(update={"tokens": "block", "layers": 2})]
    # Built twice: teachers that go through one pass together share one network from then on.
    together, apart = ([load_teacher(chosen, bench.device, bench.dtype) for chosen in choices] for _ in range(2))
    lanes = {
        "together": lambda: _extract(config, source, together, bench),
        "apart": lambda: sum(_extract(config, source, [teacher], bench) for teacher in apart),
    }
    return by_turns(lanes, config.rounds).ratio("together", "apart")


def _extract(
    config: BenchmarkExtractConfig,
    source: ImageSource,
    teachers: list[Teacher],
    bench: Bench,
    progress: Callable[[int], None] = lambda images: None,
) -> float:
    workers = config.data.workers if config.data is not None else config.workers
    extractor = Extractor(source, config.views, teachers, config.batch_size, workers, config.store)
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        return write_caches(extractor, Path(folder), max(1, min(512, len(source) // 4)), progress)[0]


def _measure_bf16(choice: TeacherConfig, views: Tensor, bench: Bench) -> dict[str, float]:
    exact, reduced = (load_teacher(choice, bench.device, dtype)(views) for dtype in (torch.float32, torch.bfloat16))
    channels = exact.tokens.shape[-1:]
    cosine = cosine_similarity(layer_norm(exact.tokens, channels), layer_norm(reduced.tokens, channels), dim=-1)
    figures = {"cosine_mean": float(cosine.mean()), "cosine_worst": float(cosine.min())}
    if exact.attention is not None and reduced.attention is not None:
        figures["attention_distance"] = float((exact.attention - reduced.attention).abs().sum(-1).mean() / 2)
    return figures


def _measure_rendering(config: BenchmarkExtractConfig, source: ImageSource, bench: Bench) -> dict[str, Any]:
    """Views/s of reading, decoding and rendering in one process; torch's time over Pillow's."""

    def render(renderer: ViewRenderer) -> None:
        for index in range(len(source)):
            renderer.__getitems__([(0, index)])

    jobs = {}
    for kind in ("pillow", "torch"):
        views = config.views.model_copy(update={"interpolation": kind})
        jobs[kind] = partial(render, ViewRenderer(source, views, config.store == "webdataset"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    rounds = by_turns(bench.lanes(jobs), config.rounds)
    torch.set_num_threads(threads)
    return rounds.ratio("torch", "pillow") | _views_per_s(rounds.rates(len(source) * config.views.count))


def _views_per_s(rates: dict[str, float]) -> dict[str, float]:
    return {f"{lane}_views_per_s": rate for lane, rate in rates.items()}


def _measure_free(
    config: BenchmarkExtractConfig, source: ImageSource, teacher: Teacher, bench: Bench
) -> dict[str, Any]:
    """Views/s of filling and writing shards, on the clock and by the main thread's own seconds."""
    extractors = {
        store: FreeForward(Extractor(source, config.views, [teacher], config.batch_size, 0, store), config.free_views)
        for store in ("zarr", "webdataset")
    }
    busy: dict[str, list[float]] = {store: [] for store in extractors}

    def write(store: str) -> float:
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            seconds, own_seconds = write_caches(extractors[store], Path(folder), extractors[store].samples_per_shard)
        busy[store].append(own_seconds)
        return seconds

    rounds = by_turns({store: partial(write, store) for store in extractors}, config.rounds)
    figures = {}
    for store, extractor in extractors.items():
        views = len(extractor.source) * config.views.count
        figures[store] = {
            "views_per_s": round(views / rounds.median(store)),
            "main_thread_views_per_s": round(views / statistics.median(busy[store][1:])),  # the first round warms up
        }
    return figures
