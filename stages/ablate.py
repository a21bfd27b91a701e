"""Run variants × seeds, and tabulate them.

    mrmae ablate --config configs/ablation_imagenette.yaml

Reads the sections of the commands in --config, and `ablate` beside them. Each run is the plain commands, in processes
of their own, with keys that anybody could type:

    mrmae pretrain --config FILE cache.path=... output=... seed=... (and the variant's keys)
    mrmae knn --config FILE init=... seed=... output=... (linear-probe and finetune alike)

Caches that differ (views, quantiser) are extracted first, each once. Writes caches, runs with their commands.log, and
table.md, table.csv, bars.png to ablate.output. Costs a pre-training and its measures for each variant and seed. Started
again, it skips what is done and goes on where a run stopped.
"""

import csv
import io
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from pipeline.assembly.chain import Chain
from pipeline.figures import save_figure
from pipeline.files import write_text
from pipeline.locks import lock_folder
from stages.configs.ablate import AblateConfig, VariantConfig

matplotlib.use("Agg")


@dataclass
class Row:
    """A variant's figures: measure → one value a seed, and the wall time of each seed's commands in seconds."""

    group: str
    figures: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def summary(self, measure: str) -> tuple[float, float | None] | None:
        """Mean, and sample standard deviation, which one value doesn't have."""
        values = self.figures.get(measure)
        if not values:
            return None
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def run(config: AblateConfig, file: Path, say: Callable[[str], None] = lambda line: None) -> str:
    """Run everything that isn't done; returns the table.

    Raises:
        ConfigError: the file lacks a section that will be needed; another process writes the folder.
        PipelineError: a command failed; its log is named. Interrupted: it was stopped.
    """
    chain = Chain(file, say)
    chain.check(_sections(config))
    with lock_folder(config.output):
        return _run_all(config, chain)


def _run_all(config: AblateConfig, chain: Chain) -> str:
    for name in dict.fromkeys(variant.cache for variant in config.chosen.values() if variant.cache is not None):
        folder = config.output / "caches"
        keys = [*config.caches[name], f"cache.path={folder / name}"]
        chain.run("extract-teacher-features", keys, folder / "logs" / name, f"cache {name}")
    rows: dict[str, Row] = {name: Row(variant.group) for name, variant in config.chosen.items()}
    for seed in config.seeds:  # seed by seed: a whole table comes early, its spread later
        for name in config.chosen:
            figures, seconds = _run_one(config, chain, name, seed)
            for measure, value in figures.items():
                rows[name].figures.setdefault(measure, []).append(value)
            rows[name].seconds.append(seconds)
    return _write(config, rows)


def _sections(config: AblateConfig) -> Iterator[str]:
    """The commands that will run."""
    yield from config.measures
    if any(variant.pretrain is not None for variant in config.chosen.values()):
        yield "pretrain"
    if any(variant.cache is not None for variant in config.chosen.values()):
        yield "extract-teacher-features"


def _run_one(config: AblateConfig, chain: Chain, name: str, seed: int) -> tuple[dict[str, float], float]:
    """The commands of one variant and seed; figures by measure, and the seconds of all its commands together."""
    folder = config.output / "runs" / name / f"seed{seed}"
    figures, seconds = dict[str, float](), 0.0
    for step, keys, output in _steps(config, config.variants[name], folder, seed):
        done = chain.run(step, keys, folder, f"{name}, seed {seed}", output)
        seconds += done.seconds
        if done.top1 is not None:
            figures[step] = done.top1
    return figures, seconds


Step = tuple[str, list[str], Path | None]  # a command, its keys, where a measure leaves its top-1


def _steps(config: AblateConfig, variant: VariantConfig, folder: Path, seed: int) -> Iterator[Step]:
    """The commands of one variant and seed, in order."""
    start = [f"init={folder / 'pretrained'}"]
    if variant.pretrain is None:
        start = ["init=null", *variant.student]
    else:
        cache = "cache=null" if variant.cache is None else f"cache.path={config.output / 'caches' / variant.cache}"
        yield "pretrain", [cache, f"output={folder / 'pretrained'}", f"seed={seed}", *variant.pretrain], None
    for measure in config.measures:
        output = folder / "finetuned" if measure == "finetune" else folder
        yield measure, [*start, f"seed={seed}", f"output={output}"], output


def _write(config: AblateConfig, rows: Mapping[str, Row]) -> str:
    measures = [str(measure) for measure in config.measures]
    lines = [f"| | {' | '.join(measures)} | minutes a seed |", "|---|" + "---|" * (len(measures) + 1)]
    group = None
    for name, row in rows.items():
        if row.group != group and row.group:
            lines.append(f"| *{row.group}* |" + " |" * (len(measures) + 1))
        group = row.group
        cells = [_cell(row.summary(measure)) for measure in measures]
        lines.append(f"| {name} | {' | '.join(cells)} | {statistics.mean(row.seconds) / 60:.1f} |")
    seeds = len(config.seeds)
    what = f"mean ± sample standard deviation of {seeds} seeds" if seeds > 1 else "one seed: no spread was measured"
    text = f"Top-1, {what}.\n\n" + "\n".join(lines) + "\n"
    write_text(config.output / "table.md", text)
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["group", "variant", "seed", *measures, "seconds"])
    for name, row in rows.items():
        for place, seed in enumerate(config.seeds):
            figures = [row.figures[m][place] if m in row.figures else "" for m in measures]
            writer.writerow([row.group, name, seed, *figures, round(row.seconds[place], 1)])
    write_text(config.output / "table.csv", stream.getvalue())
    _draw(config.output / "bars.png", rows, measures)
    return text


def _cell(summary: tuple[float, float | None] | None) -> str:
    if summary is None:
        return "–"
    mean, spread = summary
    return f"{mean:.3f}" if spread is None else f"{mean:.3f} ± {spread:.3f}"


def _draw(path: Path, rows: Mapping[str, Row], measures: list[str]) -> None:
    """A panel for each measure, a bar for each variant, its spread as a line and each seed as a dot."""
    figure = Figure(figsize=(4.4 * len(measures), 0.9 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(measures), squeeze=False, sharey=True)[0]
    names = list(rows)
    groups = list(dict.fromkeys(row.group for row in rows.values()))
    for axis, measure in zip(axes, measures, strict=True):
        for place, name in enumerate(names):
            summary = rows[name].summary(measure)
            if summary is None:
                continue
            colour = f"C{groups.index(rows[name].group) % 10}"
            axis.barh(place, summary[0], xerr=summary[1], color=colour, alpha=0.7, capsize=3)
            values = rows[name].figures[measure]
            axis.plot(values, [place] * len(values), "k.", markersize=4)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_title(f"{measure}, top-1", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    save_figure(figure, path, dpi=130)
