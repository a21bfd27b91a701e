"""Steps of MAE, of MR-MAE from a cache, and with a live teacher.

    mrmae benchmark pretrain
    mrmae benchmark pretrain data.path=/data/imagenet/train student.name=mrmae_vit_base_patch16 batch_size=256 \\
        "teachers=[{spec: clip_vitb16},{spec: clip_vitl14}]" workers=16 steps=20 compile=true

For each teacher there are four lanes with the same encoder, batch and images:

    mae            plain MAE
    cached         MR-MAE, targets from a cache
    cached_cross   the same with decoder=cross
    online         MR-MAE, the teacher's forward in the step

    cached_over_mae      time of a step: what mimicking costs (aim: 1.05)
    cross_over_mae       the same with the lean decoder (aim for ViT-B and ConvViT-B: 0.62)
    online_over_cached   time of a step: what the cache saves
    ceiling              online_over_cached by multiply-adds: (student + teacher) / student, forward and backward
    ceiling_measured     the same by measured seconds of a step and of the teacher's forward

`step` has the training side alone, `loader_images_per_s` the loading side alone. `stored_views` has the loader over a
webdataset cache against decoding the same JPEGs in a bare loop, in this process and in a worker (aim: 0.8).

Reads images (data.path) or draws some; writes caches into a temporary folder. Costs minutes on a CPU.
"""

import time
from contextlib import closing
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch

from benchmarks.configs.pretrain import BenchmarkPretrainConfig
from benchmarks.extraction_lanes import write_caches
from benchmarks.harness import Bench, by_turns, open_bench, open_or_draw
from benchmarks.training_lane import TrainingLane
from pipeline.assembly.extraction import Extractor
from pipeline.assembly.knowledge import CachedKnowledge, LiveKnowledge
from pipeline.assembly.teachers import load_teacher
from pipeline.cache import open_cache
from pipeline.configs.data import ViewConfig
from pipeline.data.decoding import decode_pixels
from pipeline.data.images import ImageSource
from pipeline.data.workers import PREFETCH
from pipeline.ownership import stage
from pipeline.teachers import Teacher
from pipeline.training.flops import peak_tflops


@stage
def run(config: BenchmarkPretrainConfig) -> dict[str, Any]:
    """Measure; returns the figures as JSON-able values.

    Raises:
        DataError, TeacherError, ConfigError: as extraction and pre-training themselves.
    """
    with open_bench(precision=config.precision, threads=config.threads, folder=config.folder) as bench:
        source = open_or_draw(config.data, config.images, bench.folder / "images", config.student.image_size or 224)
        teachers = {str(number): measure_lanes(config, number, source, bench) for number in range(len(config.teachers))}
        return bench.report(config, {"teachers": teachers, "stored_views": _measure_loader(config, source, bench)})


def measure_lanes(config: BenchmarkPretrainConfig, number: int, source: ImageSource, bench: Bench) -> dict[str, Any]:
    """The four lanes with one of the config's teachers, by turns."""
    choice = config.teachers[number].model_copy(update={"compile": config.compile})
    teacher = load_teacher(choice, bench.device, bench.dtype)
    views = ViewConfig(image_size=config.student.image_size or 224)
    crossed = config.model_copy(update={"student": config.student.model_copy(update={"decoder": "cross"})})
    cached = _extract(config, number, config.store, teacher, source, bench)
    lanes = {
        "mae": TrainingLane(config, LiveKnowledge({}, source, views), bench),
        "cached": TrainingLane(config, cached, bench),
        "cached_cross": TrainingLane(crossed, cached, bench),
        "online": TrainingLane(config, LiveKnowledge({"teacher": teacher}, source, views), bench),
    }
    images, alone = config.batch_size * config.steps, max(3, config.rounds // 3)
    trained = by_turns(bench.lanes({name: lane.train for name, lane in lanes.items()}), config.rounds)
    stepped = by_turns(bench.lanes({name: lane.step_again for name, lane in lanes.items()}), alone)
    loaded = by_turns(bench.lanes({name: lane.load for name, lane in lanes.items()}), alone)
    view = torch.zeros_like(lanes["online"].batch.images)
    forward = by_turns(bench.lanes({"forward": lambda: teacher(view)}), 3).median("forward")
    step = stepped.median("cached") / config.steps
    gmacs = {name: lane.gmacs_per_image() for name, lane in lanes.items() if name != "online"}
    gmacs["online"] = gmacs["cached"] + teacher.gmacs
    figures = {
        "teacher": teacher.spec,
        "images_per_s": trained.rates(images),
        "cached_over_mae": trained.ratio("cached", "mae"),
        "cross_over_mae": trained.ratio("cached_cross", "mae"),
        "online_over_cached": trained.ratio("online", "cached"),
        "ceiling": round(gmacs["online"] / gmacs["cached"], 3),
        "ceiling_measured": round((step + forward) / step, 3),
        "student_step_gmacs": round(gmacs["cached"], 3),
        "cross_step_gmacs": round(gmacs["cached_cross"], 3),
        "teacher_gmacs": round(teacher.gmacs, 3),
        "step": {
            "images_per_s": stepped.rates(images),
            "cached_over_mae": stepped.ratio("cached", "mae"),
            "cross_over_mae": stepped.ratio("cached_cross", "mae"),
            "online_over_cached": stepped.ratio("online", "cached"),
        },
        "loader_images_per_s": loaded.rates(images),
        "data_wait": {
            name: round(sum(lane.waits[1:]) / sum(trained.seconds[name]), 4)  # the first round warms up
            for name, lane in lanes.items()
        },
    }
    tflops = peak_tflops(bench.card)
    if tflops is not None:
        rates = trained.rates(images)
        figures["mfu"] = {name: round(rates[name] * 2e9 * gmacs[name] / (tflops * 1e12), 4) for name in lanes}
    if bench.on_gpu:
        figures["peak_memory_gib"] = {name: round(lane.peak_memory() / 2**30, 2) for name, lane in lanes.items()}
    return figures


def _measure_loader(config: BenchmarkPretrainConfig, source: ImageSource, bench: Bench) -> dict[str, Any]:
    """The loader over a webdataset cache of the first teacher, against decoding its JPEGs in this process.

    `loader` makes its batches in this process, `worker` in one other process, as in training.
    """
    teacher = load_teacher(config.teachers[0], bench.device, bench.dtype)
    knowledge = _extract(config, 0, "webdataset", teacher, source, bench)
    lane = TrainingLane(config.model_copy(update={"workers": 0, "compile": False}), knowledge, bench)
    size, count = config.student.image_size or 224, config.batch_size * config.steps
    jpegs = cycle([knowledge.caches["teacher"].read(index, 0).image or b"" for index in knowledge.samples.tolist()])
    pixels = np.empty((size, size, 3), np.uint8)

    def decode() -> None:
        for jpeg in islice(jpegs, count):
            decode_pixels(jpeg, pixels)

    def worker() -> float:
        # A worker makes batches ahead, so it is started for the measurement alone, and what it had ahead is not
        # counted. Then it is always at work, and a batch is taken as soon as it is there.
        with closing(lane.batches(workers=1)) as batches:
            for _ in range(2 * PREFETCH):
                next(batches)
            began, steps = time.perf_counter(), max(config.steps, 2 * PREFETCH)
            for _ in range(steps):
                next(batches).to(bench.device)
            return (time.perf_counter() - began) * config.steps / steps

    lanes = bench.lanes({"bare": decode, "loader": lane.load}) | {"worker": worker}
    rounds = by_turns(lanes, config.rounds)
    return {
        "loader_over_bare_decoding": rounds.ratio("bare", "loader"),
        "worker_over_bare_decoding": rounds.ratio("bare", "worker"),
        **{f"{name}_images_per_s": rate for name, rate in rounds.rates(count).items()},
    }


def _extract(
    config: BenchmarkPretrainConfig, number: int, store: str, teacher: Teacher, source: ImageSource, bench: Bench
) -> CachedKnowledge:
    """A cache of the teacher, extracted by the first call that asks for it."""
    folder, views = bench.folder / f"{number}-{store}", ViewConfig(image_size=config.student.image_size or 224)
    if not folder.exists():
        write_caches(
            Extractor(source, views, [teacher], config.batch_size, 0, store), folder, 64, quantiser=config.quantiser
        )
    cache = open_cache(folder / "0")
    return CachedKnowledge({"teacher": cache}, None if cache.stores_images else source, views, cache.live_indices())
