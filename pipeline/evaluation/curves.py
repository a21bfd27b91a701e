"""Curves as SVG, and the line by which a page shows each run everywhere."""

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

matplotlib.use("Agg")

# Okabe and Ito's colours, which colour-blind people can tell apart, in a darker shade where white needs it.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8478d", "#a67c00", "#2f9fd8", "#6a3d9a", "#3d444b")
_DASHES = ((), (4.0, 1.6), (1.0, 1.2), (6.0, 1.4, 1.0, 1.4))  # lengths of line and gap, in widths of the line
_FEW_POINTS = 40  # a curve of fewer has a dot at each


class LineStyle(NamedTuple):
    """Colour and dashes of a run: in its curves, and beside its name in tables."""

    colour: str  # #rrggbb
    dashes: tuple[float, ...]  # none: a solid line


class Curve(NamedTuple):
    """The points (step, value) of one run."""

    style: LineStyle
    points: Sequence[tuple[int, float]]


def line_style(number: int) -> LineStyle:
    """The style of run `number`, from 0. Colours repeat after eight runs, with other dashes; styles after 32."""
    return LineStyle(_COLOURS[number % len(_COLOURS)], _DASHES[number // len(_COLOURS) % len(_DASHES)])


def draw_curves(curves: Sequence[Curve], title: str, note: str = "") -> str:
    """All curves on one axis, by step, as a data URI of an SVG; `note` is a smaller line below the title."""
    figure = Figure(figsize=(4.0, 2.5), layout="constrained")
    axis = figure.subplots()
    for curve in curves:
        steps, values = zip(*curve.points, strict=True)
        marker = "." if len(steps) < _FEW_POINTS else ""
        axis.plot(steps, values, color=curve.style.colour, dashes=curve.style.dashes, linewidth=1.4, marker=marker)
    axis.set_title(title, fontsize=10, fontweight="bold", loc="left", parse_math=False, pad=18 if note else 6)
    if note:
        axis.text(0, 1.025, note, fontsize=8, color="#566069", transform=axis.transAxes, parse_math=False)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
