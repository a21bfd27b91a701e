"""Make one HTML page of a run folder.

The page shows config, curves, throughput, evaluations and pictures:

    mrmae report runs/photos

Reads what pretrain, finetune, knn, linear-probe, visualize or demo left at PATH. Writes one file, which opens without a
network. Costs seconds. A folder of several runs, such as the demo's, becomes one page with their curves laid over each
other.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pipeline.config import Config, PathField
from pipeline.errors import CheckpointError, ConfigError
from pipeline.evaluation.page import Listing, Page, Picture, Table, embed_curve, embed_png, render_page
from pipeline.evaluation.records import read_records
from pipeline.files import write_text
from pipeline.training.metrics import read_metrics

_SCORES = ("top1", "top5")
_PRECISIONS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")  # of boxes and of masks, by `detect`
_SEGMENTATION = ("mIoU", "pixel_accuracy")
_BY = ("top1", "box_AP", "mIoU")  # what the best row of an evaluation is the best by
_KNOWN = (*_SCORES, *_SEGMENTATION, *(f"{kind}_{name}" for kind in ("box", "mask") for name in _PRECISIONS))
# Curves in this order, then the others by name.
_FIRST = ("loss", "mimic_loss", "pixel_loss", "top1", "box_AP", "mask_AP", "mIoU")
_MOST_PICTURES = 32 * 2**20  # bytes of pictures on one page: a browser should still open it
_MOST_CLASSES = 40  # rows of a table of classes
_PNG = b"\x89PNG\r\n\x1a\n"


class ReportConfig(Config):
    """The options of `report`."""

    path: PathField  # a run folder, or a folder of run folders
    output: PathField | None = None  # default: report.html in it


def run(config: ReportConfig) -> dict[str, Any]:
    """Write the page; returns where it lies and what is on it.

    Raises:
        CheckpointError: the folder holds no run. ConfigError: `output` is a folder.
    """
    root = config.path
    if config.output is not None and config.output.is_dir():
        raise ConfigError(f"--output {config.output} is a folder: give the page a name in it")
    if not root.is_dir():
        raise CheckpointError(f"{root} does not exist: give the output folder of pretrain, finetune or demo")
    runs = {name: _rows(folder) for name, folder in _run_folders(root).items()}
    evaluations = _evaluations(root, runs)
    classified = [found for found in evaluations if "top1" in found[2]]
    detected = [found for found in evaluations if "box_AP" in found[2]]
    segmented = [found for found in evaluations if "mIoU" in found[2]]
    if not runs and not evaluations:
        raise CheckpointError(f"{root} holds no run (no metrics.jsonl, no metrics.json): give an output folder")
    pictures, left_out = _pictures(root)
    page = Page(
        title=f"mrmae: {root}",
        note=f"{left_out} more pictures are not shown: the page would be too large" if left_out else "",
        tables=[
            _overview(root, runs),
            *([_evaluation_table(classified)] if classified or not (detected or segmented) else []),
            *([_detection_table(detected)] if detected else []),
            *([_segmentation_table(segmented)] if segmented else []),
            *(_class_table(*found) for found in evaluations if isinstance(found[2].get("classes"), dict)),
        ],
        curves=[embed_curve(metric, runs) for metric in _metrics(runs)],
        pictures=pictures,
        configs=[
            Listing(str(file.relative_to(root)), file.read_text(encoding="utf-8", errors="replace"))
            for folder in _run_folders(root).values()
            if (file := folder / "config.yaml").is_file()
        ],
    )
    output = config.output or root / "report.html"
    write_text(output, render_page(page))
    return {"page": str(output), "runs": len(runs), "evaluations": len(evaluations), "pictures": len(pictures)}


def _run_folders(root: Path) -> dict[str, Path]:
    """Name → folder of the run itself and of those right inside."""
    found = {folder.name: folder for folder in sorted(root.iterdir()) if (folder / "metrics.jsonl").is_file()}
    return ({root.resolve().name: root} if (root / "metrics.jsonl").is_file() else {}) | found


def _rows(folder: Path) -> list[dict[str, Any]]:
    try:
        rows = read_metrics(folder / "metrics.jsonl")
    except ValueError as error:
        raise CheckpointError(f"{folder / 'metrics.jsonl'} is damaged ({error}): take the bad line out") from error
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def _metrics(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Every number that some run logged, as a curve's name."""
    named = {
        key
        for rows in runs.values()
        for row in rows
        for key, value in row.items()
        if isinstance(value, int | float) and key not in ("step", "epoch")
    }
    return [name for name in _FIRST if name in named] + sorted(named - set(_FIRST))


def _overview(root: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    folders = _run_folders(root)
    rows = []
    for name, logged in runs.items():
        last = {key: value for row in logged for key, value in row.items()}
        rates = [row["images_per_s"] for row in logged if "images_per_s" in row][1:]  # the first has the start in it
        waits = [row["data_wait"] for row in logged if "data_wait" in row][1:]
        rows.append(
            [
                name,
                _number(last.get("step")),
                _number(last.get("epoch")),
                _number(last.get("loss")),
                _number(statistics.median(rates) if rates else None),
                f"{statistics.median(waits):.1%}" if waits else "–",
                _duration(logged, _batch_size(folders[name])),
                _number(last.get("memory_gib")),
            ]
        )
    columns = ["run", "steps", "epochs", "last loss", "images/s (median)", "waiting", "trained for", "memory, GiB"]
    return Table("Training", columns, rows, "No training in this folder.")


def _duration(rows: Sequence[Mapping[str, Any]], batch_size: int | None) -> str:
    """Time in training steps: images between two rows over their rate."""
    seconds, before = 0.0, 0
    for row in rows:
        if row.get("images_per_s"):
            seconds += (row["step"] - before) * (batch_size or 0) / row["images_per_s"]
            before = row["step"]
    if not seconds:
        return "–"
    minutes, remainder = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {remainder} s"


def _batch_size(folder: Path) -> int | None:
    try:
        value = OmegaConf.select(OmegaConf.create((folder / "config.yaml").read_text(encoding="utf-8")), "batch_size")
    except (OSError, YAMLError, OmegaConfBaseException, ValueError):
        return None
    return value if isinstance(value, int) else None


def _evaluations(
    root: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(where, what, scores): of validation while training, of every metrics.json, and of a demo's table."""
    found = [(name, what, scores) for name, rows in runs.items() for what, scores in _validations(rows)]
    for file in sorted([*root.glob("metrics.json"), *root.glob("*/metrics.json"), *root.glob("*/*/metrics.json")]):
        where = str(file.parent.relative_to(root))
        for what, scores in read_records(file).items():
            if isinstance(scores, dict) and scores.keys() & {"top1", "box_AP", "mIoU"}:
                found.append(("(here)" if where == "." else where, what.replace("_", " "), scores))
    for subject, scores in read_records(root / "results.json").items():
        if isinstance(scores, dict):
            found += [(subject, what, {"top1": value}) for what, value in scores.items()]
    return found


def _validations(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """The last and the best row of each score that was logged while training, whatever stands before its name."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    numbers = {key for row in rows for key, value in row.items() if isinstance(value, int | float)}
    for score in sorted(key for key in numbers if key.endswith(_BY)):
        name = score.removesuffix("top1").removesuffix("box_AP").removesuffix("mIoU")
        scored = [row for row in rows if isinstance(row.get(score), int | float)]
        best = max(scored, key=lambda row: row[score])
        for when, row in (("last", scored[-1]), ("best", best)):
            what = f"{name.strip('_/') or 'validation'}, {when} (step {row['step']})"
            found.append((what, {key: row[name + key] for key in _KNOWN if name + key in row}))
    return found


def _evaluation_table(evaluations: Sequence[tuple[str, str, Mapping[str, Any]]]) -> Table:
    rows = [
        [where, what, *(_percent(scores.get(score)) for score in _SCORES), _details(scores)]
        for where, what, scores in evaluations
    ]
    columns = ["of", "by", "top-1", "top-5", "more"]
    return Table(
        "Evaluations", columns, rows, "None yet: knn, linear-probe, finetune --eval and detect --eval write here."
    )


def _detection_table(evaluations: Sequence[tuple[str, str, Mapping[str, Any]]]) -> Table:
    """Two rows each, one of boxes and one of masks; pycocotools' -1, where there is nothing to find, is a dash."""
    rows = [
        [where, what, f"{kind}es" if kind == "box" else f"{kind}s"]
        + [_precision(scores.get(f"{kind}_{name}")) for name in _PRECISIONS]
        for where, what, scores in evaluations
        for kind in ("box", "mask")
    ]
    return Table("Detection", ["of", "by", "what", *(name.replace("_", ", ") for name in _PRECISIONS)], rows)


def _segmentation_table(evaluations: Sequence[tuple[str, str, Mapping[str, Any]]]) -> Table:
    rows = [
        [where, what, *(_percent(scores.get(score)) for score in _SEGMENTATION)] for where, what, scores in evaluations
    ]
    return Table("Segmentation", ["of", "by", "mIoU", "pixels"], rows)


def _details(scores: Mapping[str, Any]) -> str:
    return _spelt({key: value for key, value in scores.items() if key not in (*_SCORES, "classes")})


def _class_table(where: str, what: str, scores: Mapping[str, Any]) -> Table:
    """What was measured of each class, the lowest first: {name: {figure: value}}."""
    classes = [(name, figures) for name, figures in scores["classes"].items() if isinstance(figures, dict)]
    columns = list(classes[0][1]) if classes else []
    ordered = sorted(classes, key=lambda entry: entry[1].get(columns[-1], 0))[:_MOST_CLASSES]
    lacking = f" (the {len(ordered)} lowest of {len(classes)})" if len(ordered) < len(classes) else ""
    return Table(
        f"Classes: {where}, {what}{lacking}",
        ["class", *columns],
        [[name, *map(_number, figures.values())] for name, figures in ordered],
    )


def _spelt(value: Any) -> str:
    """JSON for a person: lr 0.3, all (lr 0.1, top1 0.5; lr 0.3, top1 0.6)."""
    if isinstance(value, dict):
        return ", ".join(
            f"{key} ({_spelt(inner)})" if isinstance(inner, dict | list) else f"{key} {_spelt(inner)}"
            for key, inner in value.items()
        )
    if isinstance(value, list):
        return "; ".join(_spelt(inner) for inner in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _pictures(root: Path) -> tuple[list[Picture], int]:
    """The folder's PNGs and those one level down, as far as the page holds them; how many were left out."""
    shown, left_out, room = [], 0, _MOST_PICTURES
    for file in [*sorted(root.glob("*.png")), *sorted(root.glob("*/*.png"))]:
        if file.stat().st_size > room:
            left_out += 1
            continue
        content = file.read_bytes()
        if content.startswith(_PNG):
            room -= len(content)
            shown.append(embed_png(content, str(file.relative_to(root))))
    return shown, left_out


def _percent(value: Any) -> str:
    return f"{value:.2%}" if isinstance(value, int | float) else "–"


def _precision(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) and value >= 0 else "–"


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if math.isfinite(value) else str(value)
