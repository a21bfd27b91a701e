"""Results of evaluations as tables: one table for each kind of score, the rows of one command together."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.evaluation.curves import LineStyle
from pipeline.evaluation.page import Row, Table

_MOST_ROWS = 40  # of a table inside a result, such as that of its classes
_SHARES = ("top1", "top5")  # of images: their standard error is a binomial's


class Kind(NamedTuple):
    """The scores of one kind of evaluation.

    Attributes:
        best: the score that shows an evaluation to be of this kind, and that chooses the best row of a training.
        columns: score → heading.
        parts: what stands before the scores' names → what a row of these is called; by default a row has no parts.
    """

    title: str
    best: str
    columns: Mapping[str, str]
    parts: Mapping[str, str] = {"": ""}

    @property
    def scores(self) -> list[str]:
        return [part + column for part in self.parts for column in self.columns]


KINDS = (
    Kind("Classification", "top1", {"top1": "top-1", "top5": "top-5"}),
    Kind(
        "Detection",
        "box_AP",
        {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "AP_small": "small", "AP_medium": "medium", "AP_large": "large"},
        {"box_": "boxes", "mask_": "masks"},
    ),
    Kind("Segmentation", "mIoU", {"mIoU": "mIoU", "pixel_accuracy": "pixels"}),
)


class Evaluation(NamedTuple):
    """One result.

    Attributes:
        subject: the run or folder that it is of.
        style: the line of this run; None for what has no curves.
        what: the command, or when it was measured while training.
        scores: as in metrics.json; fractions.
        images: that it was measured on, if recorded.
        date: as the page shows it.
    """

    subject: str
    style: LineStyle | None
    what: str
    scores: Mapping[str, Any]
    images: int | None = None
    date: str = "–"


def is_evaluation(scores: object) -> bool:
    """Whether an entry of metrics.json holds scores of some kind."""
    return isinstance(scores, dict) and any(kind.best in scores for kind in KINDS)


def validations(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What was measured while training: (last or best and its step, scores) for each score that chooses the best.

    A name may stand before it, as in knn_top1.
    """
    numbers = {key for row in rows for key, value in row.items() if isinstance(value, int | float)}
    for kind in KINDS:
        for score in sorted(key for key in numbers if key.endswith(kind.best)):
            name = score.removesuffix(kind.best)
            scored = [row for row in rows if isinstance(row.get(score), int | float)]
            best = max(scored, key=lambda row: row[score])
            for when, row in (("last", scored[-1]), ("best", best)):
                figures = {key: row[name + key] for key in kind.scores if name + key in row}
                yield f"{name.strip('_/') or 'validation'}, {when}", {**figures, "step": row["step"]}


def score_tables(evaluations: Sequence[Evaluation]) -> list[Table]:
    """A table for each kind that was measured, then those inside of results, folded."""
    evaluations = _without_repeats(evaluations)
    tables = [_table(kind, found) for kind in KINDS if (found := [e for e in evaluations if kind.best in e.scores])]
    return tables + [table for evaluation in evaluations for table in _inner_tables(evaluation)]


def _without_repeats(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Leaves "best" out where it is the last one of every run."""
    scores = {(evaluation.subject, evaluation.what): evaluation.scores for evaluation in evaluations}
    better = {
        what
        for (subject, what), values in scores.items()
        if scores.get((subject, f"{what.removesuffix(', best')}, last"), values) != values
    }
    return [e for e in evaluations if not e.what.endswith(", best") or e.what in better]


def _table(kind: Kind, evaluations: Sequence[Evaluation]) -> Table:
    """Rows of the same command follow each other, so that runs can be compared."""
    order = list(dict.fromkeys(evaluation.what for evaluation in evaluations))
    parted = len(kind.parts) > 1
    rows = [
        Row(
            [
                evaluation.subject,
                *([name] if parted else []),
                *(
                    show_score(column, evaluation.scores.get(part + column), evaluation.images)
                    for column in kind.columns
                ),
                show_number(evaluation.images),
                evaluation.date,
                _details(kind, evaluation.scores),
            ],
            evaluation.style,
            evaluation.what,
        )
        for what in order
        for evaluation in evaluations
        if evaluation.what == what
        for part, name in kind.parts.items()
    ]
    columns = ["of", *(["what"] if parted else []), *kind.columns.values(), "images", "date", "more"]
    note = "± is one standard error, binomial in the number of images." if "top1" in kind.columns else ""
    return Table(kind.title, columns, rows, note=note)


def _details(kind: Kind, scores: Mapping[str, Any]) -> str:
    shown = {*kind.scores, "images", "made"}
    return spell({key: value for key, value in scores.items() if key not in shown and not _is_table(value)})


def _is_table(value: object) -> bool:
    rows = list(value.values()) if isinstance(value, dict) else value
    return isinstance(rows, list) and len(rows) > 0 and all(isinstance(row, dict) for row in rows)


def _inner_tables(evaluation: Evaluation) -> Iterator[Table]:
    """A table for each list or mapping of rows inside a result, such as its classes, the lowest first."""
    for key, value in evaluation.scores.items():
        if key == "made" or not _is_table(value):
            continue
        named = isinstance(value, dict)
        images = None if named else evaluation.images  # of a list, every row is of all images; classes divide them
        entries = list(value.items()) if named else list(enumerate(value))
        columns = list(entries[0][1])
        if named:
            entries.sort(key=lambda entry: _sortable(entry[1].get(columns[-1]) if columns else None))
        shown = entries[:_MOST_ROWS]
        cut = f" (the {len(shown)} lowest of {len(entries)})" if named and len(shown) < len(entries) else ""
        rows = [
            Row(
                [
                    *([str(name)] if named else []),
                    *(show_score(name, figures.get(name), figures.get("images", images)) for name in columns),
                ]
            )
            for name, figures in shown
        ]
        title = f"{evaluation.subject}, {evaluation.what}: {key}{cut}"
        yield Table(title, [*([key] if named else []), *columns], rows, folded=True)


def _sortable(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def show_score(name: str, value: Any, images: Any = None) -> str:
    """A cell: shares of images in percent with their standard error, average precisions as fractions.

    pycocotools gives an AP of -1 where there is nothing to find.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "–" if value is None else spell(value)
    if name in _SHARES:
        error = ""
        if isinstance(images, int) and images > 0 and 0 <= value <= 1:
            error = f" ± {100 * math.sqrt(value * (1 - value) / images):.2f}"
        return f"{100 * value:.2f}{error} %"
    if name in ("mIoU", "IoU", "pixel_accuracy"):
        return f"{100 * value:.2f} %"
    if name.startswith("AP"):
        return f"{value:.3f}" if value >= 0 else "–"
    return show_number(value)


def show_number(value: Any) -> str:
    if not isinstance(value, int | float):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if math.isfinite(value) else str(value)


def spell(value: Any) -> str:
    """JSON for a person: lr 0.3, each (a 0.1, b 0.5)."""
    if isinstance(value, dict):
        return ", ".join(
            f"{key} ({spell(inner)})" if isinstance(inner, dict | list) else f"{key} {spell(inner)}"
            for key, inner in value.items()
        )
    if isinstance(value, list):
        return "; ".join(spell(inner) for inner in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
