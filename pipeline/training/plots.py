"""Curves of one or several runs, read from their metrics.jsonl alone."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from pipeline.figures import save_figure
from pipeline.training.metrics import read_metrics

matplotlib.use("Agg")


def plot_curves(path: Path, runs: Mapping[str, Path], metrics: tuple[str, ...]) -> Path:
    """Write one panel for each metric, one line for each run (name → run folder); runs without it have no line."""
    figure = Figure(figsize=(4.2 * len(metrics), 3.4), layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        for name, folder in runs.items():
            rows = [row for row in read_metrics(folder / "metrics.jsonl") if metric in row]
            if rows:
                axis.plot([row["step"] for row in rows], [row[metric] for row in rows], label=name)
        axis.set_title(metric.replace("_", " "), fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    return save_figure(figure, path, dpi=130)
