"""Make one HTML page of one or several runs.

The page lays runs side by side: what differs in their configs, curves, throughput, evaluations, pictures and commands:

    mrmae report runs/photos
    mrmae report runs/mae runs/mr_mae --output compared.html

Reads what pretrain, finetune, detect, segment, knn, linear-probe, visualize or demo left in the folders, and up to two
levels below. Writes one file, which opens without a network: report.html in the folder, or here if there are several.
Costs seconds.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, Strict

from pipeline.assembly.report.comparing import differing_keys, stage_of
from pipeline.assembly.report.curves import ON_ONE_AXIS, curve_sections
from pipeline.assembly.report.origins import find_origins, minute
from pipeline.assembly.report.outputs import Output, distinct_names, find_outputs
from pipeline.config import Config, PathField
from pipeline.errors import ConfigError
from pipeline.evaluation.curves import LineStyle, line_style
from pipeline.evaluation.page import Listing, Name, Page, Picture, Row, Table, embed_png, render_page
from pipeline.evaluation.records import read_records
from pipeline.evaluation.scores import (
    Evaluation,
    is_evaluation,
    score_tables,
    show_number,
    show_score,
    validations,
)
from pipeline.files import write_text

_MOST_PICTURES = 32 * 2**20  # bytes of pictures on one page: a browser should still open it
_MOST_NAMES = 3  # folders that the title names
_NOT_EVALUATED = Table(
    "Evaluations", [], [], "None yet: knn, linear-probe, segment --eval, detect --eval and finetune --eval write here."
)
_PNG = b"\x89PNG\r\n\x1a\n"


class ReportConfig(Config):
    """The options of `report`."""

    paths: Annotated[tuple[PathField, ...], Strict(False)] = Field(min_length=1)  # run folders, or folders of those
    output: PathField | None = None  # default: report.html in the folder, of several in the current one


def run(config: ReportConfig) -> dict[str, Any]:
    """Write the page; returns where it lies and what is on it.

    Raises:
        CheckpointError: a folder holds no run. ConfigError: `output` is a folder.
    """
    if config.output is not None and config.output.is_dir():
        raise ConfigError(f"--output {config.output} is a folder: give the page a name in it")
    outputs = find_outputs(config.paths)
    roots = {root.resolve(): root for root in config.paths}
    trained = [output for output in outputs if output.rows]
    styles = {output.name: line_style(number) for number, output in enumerate(trained)}
    evaluations = list(_evaluations(outputs, styles))
    pictures, left_out = _pictures(roots)
    page = Page(
        title=f"mrmae: {_title(list(roots.values()))}",
        note=f"{left_out} more pictures are not shown: the page would be too large" if left_out else "",
        tables=[
            _overview(trained, styles),
            *_differences(trained, styles),
            *_grids(roots, outputs, styles),
            *(score_tables(evaluations) or [_NOT_EVALUATED]),
        ],
        legend=[Name(name, style) for name, style in styles.items()],
        curves=curve_sections(trained, styles),
        curves_note=ON_ONE_AXIS if len(trained) > 1 else "",
        pictures=pictures,
        origins=find_origins(outputs, styles),
        configs=[Listing(output.name, output.config_text) for output in outputs if output.config_text],
    )
    file = config.output or (config.paths[0] if len(roots) == 1 else Path()) / "report.html"
    write_text(file, render_page(page))
    return {"page": str(file), "runs": len(trained), "evaluations": len(evaluations), "pictures": len(pictures)}


def _title(roots: Sequence[Path]) -> str:
    names = [str(root) for root in roots]
    return ", ".join(names) if len(names) <= _MOST_NAMES else f"{names[0]} and {len(names) - 1} more folders"


def _overview(runs: Sequence[Output], styles: Mapping[str, LineStyle]) -> Table:
    rows = []
    for output in runs:
        last = {key: value for row in output.rows for key, value in row.items()}
        rates = [row["images_per_s"] for row in output.rows if "images_per_s" in row][1:]  # the first holds the start
        waits = [row["data_wait"] for row in output.rows if "data_wait" in row][1:]
        start: Mapping[str, Any] = output.starts[-1] if output.starts else {}
        cells = [
            output.name,
            stage_of(output) or "–",
            show_number(last.get("step")),
            show_number(last.get("epoch")),
            show_number(last.get("loss")),
            show_number(statistics.median(rates) if rates else None),
            f"{statistics.median(waits):.1%}" if waits else "–",
            _duration(output.rows, output.config.get("batch_size")),
            show_number(last.get("memory_gib")),
            minute(start),
            str(start.get("device", "–")),
        ]
        rows.append(Row(cells, styles[output.name]))
    columns = ["run", "command", "steps", "epochs", "last loss", "images/s", "waiting", "trained for", "memory, GiB"]
    return Table("Training", [*columns, "started", "machine"], rows, "No training in this folder.")


def _duration(rows: Sequence[Mapping[str, Any]], batch_size: object) -> str:
    """Time in training steps: images between two rows over their rate."""
    seconds, before = 0.0, 0
    for row in rows:
        if row.get("images_per_s") and isinstance(batch_size, int):
            seconds += (row["step"] - before) * batch_size / row["images_per_s"]
            before = row["step"]
    if not seconds:
        return "–"
    minutes, remainder = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {remainder} s"


def _differences(runs: Sequence[Output], styles: Mapping[str, LineStyle]) -> Iterator[Table]:
    """For each command with several runs, the keys of their configs that differ."""
    for stage in dict.fromkeys(stage_of(output) for output in runs if output.config):
        compared = [output for output in runs if output.config and stage_of(output) == stage]
        if len(compared) > 1:
            title = f"What differs between the runs of {stage}" if stage else "What differs between the runs"
            yield _difference_table(title, compared, styles)


def _difference_table(title: str, runs: Sequence[Output], styles: Mapping[str, LineStyle]) -> Table:
    """A row for each run, or for each key if these are more."""
    keys, names = differing_keys(runs), [output.name for output in runs]
    if len(keys) > len(runs):
        rows = [Row([key, *values]) for key, values in keys.items()]
        return Table(title, ["key", *names], rows, styles=[None, *(styles[name] for name in names)])
    rows = [
        Row([name, *(values[number] for values in keys.values())], styles[name]) for number, name in enumerate(names)
    ]
    return Table(title, ["run", *keys], rows if keys else [], "Nothing but the folder: they have the same config.")


def _grids(roots: Mapping[Path, Path], outputs: Sequence[Output], styles: Mapping[str, LineStyle]) -> Iterator[Table]:
    """A demo's results.json: a row for each subject, a column for each measure of its top-1."""
    names, records = distinct_names(list(roots)), {output.path: output.records for output in outputs}
    for root in roots:
        table = {name: row for name, row in read_records(root / "results.json").items() if isinstance(row, dict)}
        columns = list(dict.fromkeys(column for row in table.values() for column in row))
        demo = records.get(root, {}).get("demo")
        images = demo.get("images") if isinstance(demo, dict) else None
        rows = [
            Row([name, *(show_score("top1", row.get(column), images) for column in columns)], styles.get(name))
            for name, row in table.items()
        ]
        if rows:
            yield Table(f"Results of {names[root]}: top-1", ["of", *columns], rows)


def _evaluations(outputs: Sequence[Output], styles: Mapping[str, LineStyle]) -> Iterator[Evaluation]:
    """Of validation while training, and of every metrics.json."""
    for output in outputs:
        start: Mapping[str, Any] = output.starts[-1] if output.starts else {}
        for what, scores in validations(output.rows):
            images = start.get("evaluated_images")
            yield Evaluation(output.name, styles[output.name], what, scores, images, minute(start))
        for what, scores in output.records.items():
            if is_evaluation(scores):
                style, date = styles.get(output.name), minute(scores.get("made"))
                yield Evaluation(output.name, style, what.replace("_", " "), scores, scores.get("images"), date)


def _pictures(roots: Mapping[Path, Path]) -> tuple[list[Picture], int]:
    """The folders' PNGs and those one level down, as far as the page holds them; how many were left out."""
    names, captions = distinct_names(list(roots)), dict[Path, str]()
    for root in roots:
        for file in [*sorted(root.glob("*.png")), *sorted(root.glob("*/*.png"))]:
            name = file.relative_to(root)
            captions.setdefault(file, str(name if len(roots) == 1 else Path(names[root], name)))
    shown, left_out, room = [], 0, _MOST_PICTURES
    for file, caption in captions.items():
        if file.stat().st_size > room:
            left_out += 1
            continue
        content = file.read_bytes()
        if content.startswith(_PNG):
            room -= len(content)
            shown.append(embed_png(content, caption))
    return shown, left_out
