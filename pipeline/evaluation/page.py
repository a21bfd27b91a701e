"""One self-contained HTML page of a run: tables, curves and pictures; every value is escaped.

Pictures and curves are embedded as data. The page has no script, and its policy forbids a browser to fetch anything.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

matplotlib.use("Agg")

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; color: #1d2329; background: #fff; max-width: 76rem; margin: 0 auto;
  padding: 1.5rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #d5dbe1; text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } figcaption { color: #566069; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; } .curves { display: flex; flex-wrap: wrap; gap: .5rem; }
.curves img { width: 23rem; } pre { background: #f4f6f8; padding: 1rem; overflow-x: auto; font-size: 13px; }
.note { color: #566069; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% if note %}<p class="note">{{ note }}</p>{% endif %}
{% for table in tables %}
<h2>{{ table.title }}</h2>
{% if table.rows %}
<table>
<thead><tr>
{% for name in table.columns %}<th>{{ name }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>
{% for cell in row %}<td>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
{% else %}<p class="note">{{ table.empty }}</p>{% endif %}
{% endfor %}
<h2>Curves</h2>
{% if curves %}<div class="curves">
{% for curve in curves %}<img src="{{ curve.source }}" alt="{{ curve.caption }} by step">
{% endfor %}</div>{% else %}<p class="note">No metrics yet.</p>{% endif %}
<h2>Pictures</h2>
{% for picture in pictures %}
<figure><img src="{{ picture.source }}" alt="{{ picture.caption }}">
<figcaption>{{ picture.caption }}</figcaption></figure>
{% else %}<p class="note">No pictures in the folder: mrmae visualize draws one.</p>
{% endfor %}
<h2>Configuration</h2>
{% for config in configs %}
<details{% if loop.first %} open{% endif %}><summary>{{ config.title }}</summary><pre>{{ config.text }}</pre></details>
{% else %}<p class="note">No config.yaml in the folder.</p>
{% endfor %}
</body>
</html>
"""


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns; the first column names the row, the others measure it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    empty: str = ""  # shown if there are no rows


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, and its caption."""

    source: str
    caption: str


@dataclass(frozen=True)
class Listing:
    """The text of a file."""

    title: str
    text: str


@dataclass(frozen=True)
class Page:
    """The parts of the page, in this order."""

    title: str
    note: str = ""
    tables: Sequence[Table] = ()
    curves: Sequence[Picture] = ()
    pictures: Sequence[Picture] = ()
    configs: Sequence[Listing] = ()


def render_page(page: Page) -> str:
    """The page as HTML text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_PAGE).render(vars(page))


def embed_png(content: bytes, caption: str) -> Picture:
    """A PNG as a part of the page."""
    return Picture(f"data:image/png;base64,{base64.b64encode(content).decode()}", caption)


def embed_curve(metric: str, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Picture:
    """One metric by step as SVG, one line for each run (name → rows that hold "step" and the metric)."""
    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    axis = figure.subplots()
    for name, rows in runs.items():
        points = [(row["step"], row[metric]) for row in rows if metric in row]
        if points:
            axis.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 40 else "")
    axis.set_title(metric, fontsize=10, parse_math=False)
    axis.set_xlabel("step", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    if len(axis.lines) > 1:
        for text in axis.legend(fontsize=7).get_texts():
            text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return Picture(f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}", metric)
