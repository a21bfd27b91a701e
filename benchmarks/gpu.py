"""All that a GPU is asked for, in eight minutes.

    mrmae benchmark gpu
    mrmae benchmark gpu minutes=20 batch_size=512 folder=/fast/disk

The parts, the more important ones first:

    extract   as `benchmark extract`: views/s of the teacher's bare forward, of the stage, of its last two thirds
    steps     as `benchmark pretrain`: MAE, MR-MAE from a cache, MR-MAE with a live teacher, by turns
    sparse    as `benchmark student`: ConvViT's convolution stages on visible cells, over those on whole maps

Each part logs a line as soon as it is done. What no longer fits into `minutes` is named as skipped. A part that fails
or takes too long ends alone. A signal ends the rest, and what was found by then is printed.

Reads nothing: images are drawn, and teachers have random weights. Writes into a temporary folder. Costs `minutes`.
"""

import os
import shutil
from functools import partial
from typing import Any

import numpy as np

from benchmarks.configs.extract import BenchmarkExtractConfig
from benchmarks.configs.gpu import BenchmarkGpuConfig
from benchmarks.configs.pretrain import BenchmarkPretrainConfig
from benchmarks.configs.student import BenchmarkStudentConfig
from benchmarks.extract import measure_stage, render_batch
from benchmarks.extraction_lanes import bare_forward
from benchmarks.harness import Bench, by_turns, open_bench
from benchmarks.parts import Part, run_parts
from benchmarks.pretrain import measure_lanes
from benchmarks.student import measure_student
from pipeline.assembly.teachers import load_teacher
from pipeline.configs.data import ViewConfig
from pipeline.configs.models import StudentConfig
from pipeline.configs.teachers import TeacherConfig
from pipeline.data.drawn import draw_images
from pipeline.data.images import open_images
from pipeline.ownership import stage

_BYTES_PER_VIEW = 200_000  # of a cache, with room to spare


@stage
def run(config: BenchmarkGpuConfig) -> dict[str, Any]:
    """Measure as much as fits; returns JSON-able figures by part, or why a part has none."""
    with open_bench(folder=config.folder) as bench:
        return bench.report(config, run_parts(list_parts(config, bench), config.minutes, config.patience))


def list_parts(config: BenchmarkGpuConfig, bench: Bench) -> list[Part]:
    """The images, then all measurements in the order of their importance."""

    def steps(student: StudentConfig, compiled: bool) -> Part:
        how, seconds = ("compiled", 150) if compiled else ("eager", 45)
        return Part(f"steps {student.name} {how}", seconds, partial(_measure_steps, config, student, compiled, bench))

    def sparse(name: str, compiled: bool) -> Part:
        how, seconds = ("compiled", 90) if compiled else ("eager", 15)
        return Part(f"sparse {name} {how}", seconds, partial(_measure_sparse, config, name, compiled, bench))

    extract = [Part(f"extract {t.spec}", 45, partial(_measure_extraction, config, t, bench)) for t in config.teachers]
    eager = [steps(student, False) for student in config.students]
    compiled = [steps(student, True) for student in config.students] if config.compile else []
    sparse_eager = [sparse(name, False) for name in config.sparse]
    sparse_compiled = [sparse(name, True) for name in config.sparse] if config.compile else []
    images = Part("images", 15, partial(_draw_images, config, bench))
    important = [images, *extract[:1], *eager[:1], *compiled[:1], *sparse_eager]
    return [*important, *extract[1:], *eager[1:], *compiled[1:], *sparse_compiled]


def _draw_images(config: BenchmarkGpuConfig, bench: Bench) -> dict[str, int]:
    return {"drawn": len(draw_images(bench.folder / "drawn", config.images, config.image_size))}


def _measure_extraction(config: BenchmarkGpuConfig, choice: TeacherConfig, bench: Bench) -> dict[str, Any]:
    """Views/s of stage 1 and of its teacher alone."""
    stage_config = BenchmarkExtractConfig(
        views=ViewConfig(image_size=config.image_size), store=config.store, batch_size=config.batch_size,
        workers=_workers(config), rounds=1,
    )  # fmt: skip
    drawn = open_images(str(bench.folder / "drawn"))
    teacher = load_teacher(choice, bench.device, bench.dtype)
    forward = bare_forward(teacher, render_batch(stage_config, drawn, bench), 8 * config.batch_size, bench)
    rate = 8 * config.batch_size / by_turns(bench.lanes({"bare": forward}), 3).median("bare")
    room = shutil.disk_usage(bench.folder).free // 2 // _BYTES_PER_VIEW
    count = min(max(16, round(rate * config.seconds)), config.copies * len(drawn), room)
    source = drawn.select(np.arange(count) % len(drawn))
    return measure_stage(stage_config, source, teacher, bench) | {
        "views": count,
        "workers": stage_config.workers,
        "teacher_gmacs": round(teacher.gmacs, 2),
    }


def _measure_steps(config: BenchmarkGpuConfig, student: StudentConfig, compiled: bool, bench: Bench) -> dict[str, Any]:
    """The lanes of a student, with the first teacher."""
    source = open_images(str(bench.folder / "drawn"))
    lanes = BenchmarkPretrainConfig(
        images=len(source), student=student, teachers=config.teachers[:1], store=config.store,
        batch_size=config.batch_size, compile=compiled, workers=_workers(config), rounds=config.rounds,
        steps=config.steps,
    )  # fmt: skip
    return measure_lanes(lanes, 0, source, bench)


def _measure_sparse(config: BenchmarkGpuConfig, name: str, compiled: bool, bench: Bench) -> dict[str, Any]:
    """ConvViT's two paths, forward and backward."""
    passes = BenchmarkStudentConfig(
        batch_size=config.sparse_batch_size,
        image_size=config.image_size,
        rounds=config.rounds,
        peak_memory=bench.on_gpu,
    )
    return measure_student(passes, name, bench, compiled)


def _workers(config: BenchmarkGpuConfig) -> int:
    return min(16, max(1, (os.cpu_count() or 1) - 2)) if config.workers is None else config.workers
