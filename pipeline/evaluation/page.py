"""One self-contained HTML page of runs: tables, curves and pictures; every value is escaped.

Pictures and curves are embedded as data. The page has no script, and its policy forbids a browser to fetch anything.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, StrictUndefined

from pipeline.evaluation.curves import LineStyle

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { --ink: #1d2329; --soft: #566069; --rule: #d5dbe1; --wash: #f4f6f8; }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: #fff; max-width: 76rem; margin: 0 auto;
  padding: 1.5rem clamp(.8rem, 3vw, 1.5rem) 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
.note { color: var(--soft); margin: .3rem 0 .7rem; max-width: 60rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .3rem 1.1rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top;
  max-width: 22rem; overflow-wrap: break-word; }
thead th { color: var(--soft); font-weight: 600; font-size: .87rem; vertical-align: bottom; }
td { font-variant-numeric: tabular-nums; }
.short { white-space: nowrap; } .long { min-width: 11rem; }
tr.group th { padding-top: .9rem; font-weight: 600; }
th.run { font-weight: 500; }
svg.line { width: 26px; height: 10px; margin-right: .45rem; vertical-align: baseline; flex: none; }
.run span { display: inline-flex; align-items: baseline; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; list-style: none; padding: 0; margin: .4rem 0 .8rem; }
.legend li { display: inline-flex; align-items: baseline; overflow-wrap: anywhere; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: .8rem 1.2rem; }
img { max-width: 100%; height: auto; display: block; } .curves img { width: 100%; }
.curves + .scroll { margin-top: 1rem; }
figure { margin: 1rem 0 1.6rem; } figcaption { color: var(--soft); overflow-wrap: anywhere; margin-bottom: .3rem; }
pre { background: var(--wash); padding: .7rem 1rem; margin: .3rem 0 1rem; font-size: 13px; overflow-x: auto; }
pre.command { white-space: pre-wrap; overflow-wrap: anywhere; }
section { margin-bottom: 1.6rem; } section p { margin: 0; }
details { margin: .5rem 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
</style>
</head>
<body>
{% macro line(style) %}
{% if style %}<svg class="line" viewBox="0 0 26 10" aria-hidden="true"><line x1="0" y1="6" x2="26" y2="6" stroke="{{
style.colour }}" stroke-width="3"{% if style.dashes %} stroke-dasharray="{{ style.dashes|map('multiply')|join(' ')
}}"{% endif %}/></svg>{% endif %}
{% endmacro %}
{% macro width(text) %}{{ "short" if text|length < 24 else "long" }}{% endmacro %}
{% macro grid(table) %}
{% if table.note %}<p class="note">{{ table.note }}</p>{% endif %}
{% if table.rows %}
<div class="scroll"><table>
<thead><tr>
{% for name in table.columns %}
<th scope="col">{{ line(table.styles[loop.index0]) if table.styles }}{{ name }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in table.rows %}
{% if row.group and loop.changed(row.group) %}
<tr class="group"><th colspan="{{ table.columns|length }}" scope="rowgroup">{{ row.group }}</th></tr>
{% endif %}
<tr>
<th class="run {{ width(row.cells[0]) }}" scope="row"><span>{{ line(row.style) }}{{ row.cells[0] }}</span></th>
{% for cell in row.cells[1:] %}
<td class="{{ width(cell) }}">{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>
{% else %}<p class="note">{{ table.empty }}</p>{% endif %}
{% endmacro %}
<h1>{{ title }}</h1>
{% if note %}<p class="note">{{ note }}</p>{% endif %}
{% for table in tables if not table.folded %}
<h2>{{ table.title }}</h2>
{{ grid(table) }}
{% endfor %}
{% for table in tables if table.folded %}
<details><summary>{{ table.title }}</summary>{{ grid(table) }}</details>
{% endfor %}
<h2>Curves</h2>
{% if legend|length > 1 %}
<ul class="legend">{% for run in legend %}<li>{{ line(run.style) }}{{ run.name }}</li>{% endfor %}</ul>
{% endif %}
{% if curves_note %}<p class="note">{{ curves_note }}</p>{% endif %}
{% for section in curves %}
<h3>{{ section.title }}</h3>
{% if section.pictures %}
<div class="curves">
{% for curve in section.pictures %}
<img src="{{ curve.source }}" alt="{{ curve.caption }}">
{% endfor %}
</div>
{% endif %}
{% if section.table %}{{ grid(section.table) }}{% endif %}
{% else %}<p class="note">No metrics yet.</p>
{% endfor %}
<h2>Pictures</h2>
{% for picture in pictures %}
<figure><figcaption>{{ picture.caption }}</figcaption><img src="{{ picture.source }}" alt="{{ picture.caption }}">
</figure>
{% else %}<p class="note">No pictures in the folder: mrmae visualize draws one.</p>
{% endfor %}
<h2>How it was made</h2>
{% for origin in origins %}
<section>
<pre class="command">{{ origin.command or "–" }}</pre>
<p class="note">{{ origin.machine }}</p>
<ul class="legend">{% for name in origin.made %}<li>{{ line(name.style) }}{{ name.name }}</li>{% endfor %}</ul>
</section>
{% else %}<p class="note">No command is recorded.</p>
{% endfor %}
<h2>Configuration</h2>
{% for config in configs %}
<details{% if configs|length == 1 %} open{% endif %}><summary>{{ config.title }}</summary><pre>{{ config.text }}</pre>
</details>
{% else %}<p class="note">No config.yaml in the folder.</p>
{% endfor %}
</body>
</html>
"""


@dataclass(frozen=True)
class Row:
    """Cells under a table's columns, of which the first names the row; rows of a group stand below its name."""

    cells: Sequence[str]
    style: LineStyle | None = None  # the line of the run that the row is of
    group: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under columns."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Row]
    empty: str = ""  # shown if there are no rows
    note: str = ""
    folded: bool = False  # only its title is shown before a reader asks for more
    styles: Sequence[LineStyle | None] = ()  # of the columns, where these are runs


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, and its caption."""

    source: str
    caption: str


@dataclass(frozen=True)
class Section:
    """Curves of one sort, and what has too few points for a curve."""

    title: str
    pictures: Sequence[Picture]
    table: Table | None = None


@dataclass(frozen=True)
class Origin:
    """A command, where it ran, and what it made."""

    made: Sequence["Name"]
    machine: str
    command: str


@dataclass(frozen=True)
class Name:
    """A run with its line."""

    name: str
    style: LineStyle | None


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
    legend: Sequence[Name] = ()
    curves: Sequence[Section] = ()
    curves_note: str = ""
    pictures: Sequence[Picture] = ()
    origins: Sequence[Origin] = ()
    configs: Sequence[Listing] = ()


def render_page(page: Page) -> str:
    """The page as HTML text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["multiply"] = lambda length: f"{3 * length:g}"  # widths of the line, which is 3 wide
    return environment.from_string(_PAGE).render(vars(page))


def embed_png(content: bytes, caption: str) -> Picture:
    """A PNG as a part of the page."""
    return Picture(f"data:image/png;base64,{base64.b64encode(content).decode()}", caption)
