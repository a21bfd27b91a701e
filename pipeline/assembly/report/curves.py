"""The curves of several runs: which metrics are drawn, whose lines share an axis, and what is told as text."""

import math
from collections.abc import Mapping, Sequence

from pipeline.assembly.report.comparing import comparable
from pipeline.assembly.report.outputs import Output
from pipeline.evaluation.curves import Curve, LineStyle, draw_curves
from pipeline.evaluation.page import Picture, Row, Section, Table
from pipeline.evaluation.scores import KINDS, show_number

# Curves in this order, then the others by name.
_FIRST = ("loss", "mimic_loss", "pixel_loss", "summary_loss", "top1", "box_AP", "mask_AP", "mIoU")
ON_ONE_AXIS = (
    "Runs share an axis where a metric means the same. Where a metric has several plots, small print names the keys "
    "that differ: values of different plots can't be compared."
)

Points = list[tuple[int, float]]  # (step, value)


def curve_sections(runs: Sequence[Output], styles: Mapping[str, LineStyle]) -> list[Section]:
    """Losses, scores and the rest; below the curves a table of what has one value alone, once or all the time."""
    metrics = {key for output in runs for row in output.rows for key, value in row.items() if _is_number(value)}
    ordered = [name for name in _FIRST if name in metrics] + sorted(metrics - {*_FIRST, "step", "epoch"})
    sections: dict[str, list[str]] = {"Losses": [], "Scores": [], "Speed, rate and gradients": []}
    for metric in ordered:
        sections[_section_of(metric)].append(metric)
    return [_section(title, names, runs, styles) for title, names in sections.items() if names]


def _section_of(metric: str) -> str:
    if "loss" in metric and not metric.startswith("grad_norm"):
        return "Losses"
    scored = any(metric.endswith(score) for kind in KINDS for score in kind.scores)
    return "Scores" if scored else "Speed, rate and gradients"


def _section(title: str, metrics: Sequence[str], runs: Sequence[Output], styles: Mapping[str, LineStyle]) -> Section:
    pictures, single = [], dict[str, dict[str, float]]()
    for metric in metrics:
        points = {output.name: found for output in runs if (found := _points(output, metric))}
        groups = comparable(metric, [output for output in runs if output.name in points])
        for group, note in groups:
            curves = {output.name: [p for p in points[output.name] if math.isfinite(p[1])] for output in group}
            if any(len({value for _, value in found}) > 1 for found in curves.values()):
                drawn = [Curve(styles[name], found) for name, found in curves.items() if found]
                caption = f"{metric} by step{f', {note}' if note else ''}"
                pictures.append(Picture(draw_curves(drawn, metric, note), caption))
            else:
                for output in group:
                    single.setdefault(output.name, {})[metric] = points[output.name][-1][1]
    columns = [metric for metric in metrics if any(metric in values for values in single.values())]
    rows = [
        Row([name, *(show_number(values.get(metric)) for metric in columns)], styles[name])
        for name, values in single.items()
    ]
    return Section(title, pictures, Table("", ["one value", *columns], rows) if rows else None)


def _points(output: Output, metric: str) -> Points:
    return [(row["step"], float(row[metric])) for row in output.rows if _is_number(row.get(metric))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
