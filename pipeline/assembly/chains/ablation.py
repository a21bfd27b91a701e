"""What an ablation found: rows of variants × seeds, as tables and pictures."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from omegaconf import OmegaConf

from pipeline.figures import save_figure
from pipeline.files import write_text
from pipeline.training.metrics import read_metrics

matplotlib.use("Agg")


class Curve(NamedTuple):
    """k-NN during one pre-training: float64 [n] each, ascending in steps."""

    steps: NDArray[np.float64]
    seconds: NDArray[np.float64]  # of training, without evaluations and checkpoints
    top1: NDArray[np.float64]


@dataclass
class Row:
    """A variant's figures, by seed; what is not measured yet is absent.

    Attributes:
        figures: measure → seed → top-1.
        seconds: wall time of all the seed's commands.
        curves: of runs that measured k-NN on their way.
    """

    group: str
    figures: dict[str, dict[int, float]] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    curves: dict[int, Curve] = field(default_factory=dict)

    def values(self, measure: str) -> list[float]:
        """Top-1 of the measured seeds, in their order."""
        by_seed = self.figures.get(measure, {})
        return [by_seed[seed] for seed in sorted(by_seed)]


def read_curve(run: Path) -> Curve | None:
    """The k-NN curve that a pre-training left in its folder; None without at least two points.

    Seconds are summed from the rows' images/s, so they hold over interruptions and leave evaluations out.
    """
    batch_size = _batch_size(run)
    steps, seconds, top1 = list[float](), list[float](), list[float]()
    step, elapsed = 0, 0.0
    for row in read_metrics(run / "metrics.jsonl"):
        if "images_per_s" in row:
            elapsed += (row["step"] - step) * batch_size / row["images_per_s"]
            step = row["step"]
        if "knn_top1" in row:
            steps.append(row["step"])
            seconds.append(elapsed)
            top1.append(row["knn_top1"])
    return Curve(np.array(steps), np.array(seconds), np.array(top1)) if len(steps) > 1 else None


class Cost(NamedTuple):
    """What a pre-training takes, in seconds.

    Attributes:
        step: of a step.
        knn: of a k-NN on the way; 0 without.
        knn_every: steps from one to the next.
    """

    step: float
    knn: float
    knn_every: int

    def knns(self, steps: int) -> float:
        """Of all k-NN of a run of so many steps; the last step has one too."""
        return self.knn * math.ceil(steps / self.knn_every)

    @property
    def rate(self) -> float:
        """Of a step with its share of the k-NN on the way."""
        return self.step + self.knn / self.knn_every


def read_cost(run: Path) -> Cost:
    """What a short pre-training took, by the last rows of its metrics."""
    rows = read_metrics(run / "metrics.jsonl")
    step = _batch_size(run) / float([row for row in rows if "images_per_s" in row][-1]["images_per_s"])
    evaluated = [row for row in rows if "knn_top1" in row]
    if not evaluated:
        return Cost(step, 0.0, 1)
    steps_per_epoch = rows[0]["step"] / rows[0]["epoch"]
    every = OmegaConf.load(run / "config.yaml").knn.every * steps_per_epoch
    return Cost(step, float(evaluated[-1].get("evaluation_s", 0.0)), max(1, round(every)))


def _batch_size(run: Path) -> int:
    return int(OmegaConf.load(run / "config.yaml").batch_size)


def write_tables(folder: Path, rows: Mapping[str, Row], seeds: Sequence[int], measures: Sequence[str]) -> str:
    """Write table.md, table.csv, bars.png and, of runs with k-NN curves, curves.png; returns the Markdown."""
    text = _table(rows, seeds, measures)
    curves = {name: list(row.curves.values()) for name, row in rows.items() if row.curves}
    if curves:
        text += "\n" + _ranking(curves)
        _draw_curves(folder / "curves.png", curves)
    write_text(folder / "table.md", text)
    write_text(folder / "table.csv", _csv(rows, measures))
    _draw_bars(folder / "bars.png", rows, measures)
    return text


def mean_and_spread(values: Sequence[float]) -> str:
    """A cell of a table: "0.487 ± 0.002" of several seeds, the value of one, "–" of none."""
    if not values:
        return "–"
    mean = statistics.mean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def describe_spread(seeds: int) -> str:
    """What the cells of a table are, for its heading."""
    several = f"mean ± sample standard deviation of {seeds} seeds"
    return several if seeds > 1 else "one seed: no spread was measured"


def _table(rows: Mapping[str, Row], seeds: Sequence[int], measures: Sequence[str]) -> str:
    lines = [f"| | {' | '.join(measures)} | minutes a seed |", "|---|" + "---|" * (len(measures) + 1)]
    group = None
    for name, row in rows.items():
        if row.group != group and row.group:
            lines.append(f"| *{row.group}* |" + " |" * (len(measures) + 1))
        group = row.group
        cells = [mean_and_spread(row.values(measure)) for measure in measures]
        minutes = f"{statistics.mean(row.seconds.values()) / 60:.1f}" if row.seconds else "–"
        lines.append(f"| {name} | {' | '.join(cells)} | {minutes} |")
    missing = sum(len(seeds) - len(row.seconds) for row in rows.values())
    state = f" {missing} runs are still to come." if missing else ""
    return f"Top-1, {describe_spread(len(seeds))}.{state}\n\n" + "\n".join(lines) + "\n"


def _ranking(curves: Mapping[str, Sequence[Curve]]) -> str:
    """Variants by k-NN at the last step, beside k-NN after the seconds that the fastest one took.

    A curve that begins later than that says nothing of it.
    """
    shortest = min(curve.seconds[-1] for several in curves.values() for curve in several)
    last = {name: [float(curve.top1[-1]) for curve in several] for name, several in curves.items()}
    in_time = {
        name: [float(np.interp(shortest, c.seconds, c.top1)) for c in several if c.seconds[0] <= shortest]
        for name, several in curves.items()
    }
    by_steps, by_seconds = _ranked(last), _ranked(in_time)
    lines = [
        f"| rank by steps | k-NN at the last step | k-NN after {shortest:.3g} s of training | rank by seconds |",
        "|---|---|---|---|",
    ]
    for place, name in enumerate(by_steps, 1):
        rank = str(by_seconds.index(name) + 1) if name in by_seconds else "–"
        cells = mean_and_spread(last[name]), mean_and_spread(in_time[name]), rank
        lines.append(f"| {place}. {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _ranked(values: Mapping[str, Sequence[float]]) -> list[str]:
    """Names by their means, the highest first."""
    means = {name: statistics.mean(of) for name, of in values.items() if of}
    return sorted(means, key=lambda name: -means[name])


def _csv(rows: Mapping[str, Row], measures: Sequence[str]) -> str:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["group", "variant", "seed", *measures, "seconds"])
    for name, row in rows.items():
        for seed in sorted(row.seconds):
            figures = [row.figures.get(measure, {}).get(seed, "") for measure in measures]
            writer.writerow([row.group, name, seed, *figures, round(row.seconds[seed], 1)])
    return stream.getvalue()


def _draw_bars(path: Path, rows: Mapping[str, Row], measures: Sequence[str]) -> None:
    """A panel for each measure, a bar for each variant, its spread as a line and each seed as a dot."""
    figure = Figure(figsize=(4.4 * len(measures), 0.9 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(measures), squeeze=False, sharey=True)[0]
    names = list(rows)
    groups = list(dict.fromkeys(row.group for row in rows.values()))
    for axis, measure in zip(axes, measures, strict=True):
        for place, row in enumerate(rows.values()):
            values = row.values(measure)
            if not values:
                continue
            spread = statistics.stdev(values) if len(values) > 1 else None
            colour = f"C{groups.index(row.group) % 10}"
            axis.barh(place, statistics.mean(values), xerr=spread, color=colour, alpha=0.7, capsize=3)
            axis.plot(values, [place] * len(values), "k.", markersize=4)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_title(f"{measure}, top-1", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    save_figure(figure, path, dpi=130)


def _draw_curves(path: Path, curves: Mapping[str, Sequence[Curve]]) -> None:
    """k-NN over steps and over seconds of training: a colour for each variant, a line for each seed."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axis, unit in zip(figure.subplots(1, 2, sharey=True), ("steps", "seconds"), strict=True):
        for number, (name, several) in enumerate(curves.items()):
            style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
            for place, curve in enumerate(several):
                axis.plot(getattr(curve, unit), curve.top1, label=name if place == 0 else None, **style)
        axis.set_xlabel({"steps": "step", "seconds": "seconds of training"}[unit])
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("k-NN, top-1")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save_figure(figure, path, dpi=130)
