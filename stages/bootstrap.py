"""Pre-train in stages: each student is the teacher of the next one.

    mrmae bootstrap --config configs/ablation_imagenette.yaml stages=2

Reads the sections of the commands in --config, and `bootstrap` beside them. Stage 1 learns from the teacher of
`extract-teacher-features`, or from pixels alone with start=pixels. Each later stage extracts the features of the
student before it and trains a new one, as dBOT does (arXiv 2209.03917). The first teacher may keep a share of the mimic
loss (first_teacher=0.3). Each run is the plain commands, in processes of their own, with keys that anybody could type:

    mrmae extract-teacher-features --config FILE teacher.spec=mrmae:STUDENT cache.path=...
    mrmae pretrain --config FILE cache.path=... output=... seed=...
    mrmae knn --config FILE init=... seed=... output=...

Writes a folder for each seed and stage, and table.md, table.csv and curve.png to bootstrap.output. Costs an extraction
and a pre-training for each stage. Started again, it skips what is done and goes on where a command stopped.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from pipeline.assembly.chains.ablation import describe_spread, mean_and_spread
from pipeline.assembly.chains.chain import Chain
from pipeline.configs.teachers import TeacherConfig
from pipeline.errors import ConfigError
from pipeline.figures import save_figure
from pipeline.files import write_text
from pipeline.locks import lock_folder
from stages.configs.bootstrap import BootstrapConfig

matplotlib.use("Agg")

_EXTRACT = "extract-teacher-features"
# What the section says of the first teacher (its weights, size and layers) isn't meant for a student: the defaults are.
_NO_OTHER_KEYS = [
    f"teacher.{name}={'null' if field.default is None else field.default}"
    for name, field in TeacherConfig.model_fields.items()
    if name not in (TeacherConfig.main_key, "compile")
]


@dataclass(frozen=True)
class Result:
    """What one seed's student of one stage reached: measure → top-1, and the seconds of the stage's commands."""

    seed: int
    stage: int
    top1: dict[str, float]
    seconds: float


def run(config: BootstrapConfig, file: Path, say: Callable[[str], None] = lambda line: None) -> str:
    """Run every stage that isn't done; returns the table.

    Raises:
        ConfigError: the file lacks a section that will be needed, or has several teachers.
        PipelineError: a command failed; its log is named. Interrupted: it was stopped.
    """
    chain = Chain(file, say)
    extracts = config.start == "teacher" or config.stages > 1
    chain.check([*([_EXTRACT] if extracts else []), "pretrain", *config.measures])
    if extracts and chain.section(_EXTRACT).get("teachers"):
        raise ConfigError(f"--config {file}, section '{_EXTRACT}': stages have one teacher; give teacher.spec instead")
    with lock_folder(config.output), chain:
        return _run_all(config, chain)


def _run_all(config: BootstrapConfig, chain: Chain) -> str:
    if config.start == "teacher":
        cache = _first_cache(config)
        chain.run(_EXTRACT, [f"cache.path={cache}"], cache.parent, "stage 1")
    results: list[Result] = []
    for seed in config.seeds:
        for stage in range(1, config.stages + 1):
            results.append(_run_stage(config, chain, seed, stage))
            _write(config, results)  # a table grows stage by stage
    return _write(config, results)


def _first_cache(config: BootstrapConfig) -> Path:
    """The first teacher's cache, which all seeds share."""
    return config.output / "first_teacher" / "cache"


def _folder(config: BootstrapConfig, seed: int, stage: int) -> Path:
    return config.output / f"seed{seed}" / f"stage{stage}"


def _run_stage(config: BootstrapConfig, chain: Chain, seed: int, stage: int) -> Result:
    """The commands of one stage: extraction from the student before it, pre-training, measures."""
    folder, title = _folder(config, seed, stage), f"seed {seed}, stage {stage}"
    seconds, top1 = 0.0, dict[str, float]()
    for step, keys in _steps(config, seed, stage):
        done = chain.run(step, keys, folder, title, folder if step in config.measures else None)
        seconds += done.seconds
        if done.top1 is not None:
            top1[step] = done.top1
    return Result(seed, stage, top1, seconds)


def _steps(config: BootstrapConfig, seed: int, stage: int) -> Iterator[tuple[str, list[str]]]:
    """(command, its keys) of one stage, in order."""
    folder = _folder(config, seed, stage)
    student, cache = folder / "student", folder / "cache"
    trained = [f"output={student}", f"seed={seed}"]
    if stage == 1 and config.start == "pixels":
        yield "pretrain", ["cache=null", "mimic.objective=mae", "mask.focus=random", *trained]
    elif stage == 1:
        yield "pretrain", [f"cache.path={_first_cache(config)}", *trained]
    else:
        before = _folder(config, seed, stage - 1) / "student"
        yield _EXTRACT, [f"teacher.spec=mrmae:{before}", *_NO_OTHER_KEYS, f"cache.path={cache}"]
        start = [f"init={before}"] if config.init == "previous" else []
        yield "pretrain", [*_later_caches(config, cache), *trained, *start, *config.pretrain]
    for measure in config.measures:
        yield measure, [f"init={student}", f"seed={seed}", f"output={folder}"]


def _later_caches(config: BootstrapConfig, cache: Path) -> list[str]:
    if not config.first_teacher:
        return [f"cache.path={cache}"]
    return [
        "cache=null",
        f"caches={{previous: {{path: '{cache}'}}, first: {{path: '{_first_cache(config)}'}}}}",
        f"mimic.teacher_weights={{previous: {1 - config.first_teacher}, first: {config.first_teacher}}}",
    ]


def _write(config: BootstrapConfig, results: list[Result]) -> str:
    """The table as Markdown and CSV, and its curve; returns the Markdown."""
    measures = [str(measure) for measure in config.measures]
    lines = [f"| stage | {' | '.join(measures)} | minutes |", "|---|" + "---|" * (len(measures) + 1)]
    stages = sorted({row.stage for row in results})
    for stage in stages:
        rows = [result for result in results if result.stage == stage]
        top1 = " | ".join(mean_and_spread([row.top1[measure] for row in rows]) for measure in measures)
        lines.append(f"| {stage} | {top1} | {statistics.mean(row.seconds for row in rows) / 60:.1f} |")
    seeds = len({row.seed for row in results})
    text = f"Top-1 of each stage's student, {describe_spread(seeds)}.\n\n" + "\n".join(lines) + "\n"
    write_text(config.output / "table.md", text)
    csv_lines = [",".join(["seed", "stage", *measures, "seconds"])]
    for row in results:
        top1 = ",".join(str(row.top1[measure]) for measure in measures)
        csv_lines.append(f"{row.seed},{row.stage},{top1},{row.seconds:.1f}")
    write_text(config.output / "table.csv", "\n".join(csv_lines) + "\n")
    _draw(config.output / "curve.png", results, measures)
    return text


def _draw(path: Path, results: list[Result], measures: list[str]) -> None:
    """A panel for each measure: top-1 over stages, a line for each seed."""
    figure = Figure(figsize=(4.2 * len(measures), 3.4), layout="constrained")
    for axis, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
        for seed in sorted({row.seed for row in results}):
            rows = [row for row in results if row.seed == seed]
            axis.plot([row.stage for row in rows], [row.top1[measure] for row in rows], "o-", label=f"seed {seed}")
        axis.set_title(f"{measure}, top-1", fontsize=10)
        axis.set_xlabel("stage")
        axis.set_xticks(sorted({row.stage for row in results}))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save_figure(figure, path, dpi=130)
