"""What a classifier says of images, as CSV or JSON lines.

CSV has the columns key, class_1, probability_1, ..., error. A line of JSON is {"key", "classes": [{"class",
"probability"}, ...]} or {"key", "error"}.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import ConfigError

_ENDINGS = (".csv", ".jsonl")


class Prediction(NamedTuple):
    """The likeliest classes of an image with their probabilities, or why it can't be read."""

    key: str
    classes: list[tuple[str, float]]
    fault: str


def check_format(path: Path | None) -> None:
    """Raises ConfigError if the ending names no format."""
    if path is not None and path.suffix not in _ENDINGS:
        raise ConfigError(f"output={path}: choose a name that ends with {' or '.join(_ENDINGS)}")


def format_predictions(rows: Sequence[Prediction], top: int, path: Path | None) -> str:
    """The text of the file `path`; CSV without one.

    Args:
        top: classes of each image.
    """
    if path is not None and path.suffix == ".jsonl":
        return "".join(json.dumps(_as_json(row), ensure_ascii=False) + "\n" for row in rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["key", *(f"{name}_{place}" for place in range(1, top + 1) for name in ("class", "probability")), "error"]
    )
    for row in rows:
        cells = [cell for name, probability in row.classes for cell in (name, f"{probability:.6g}")]
        writer.writerow([row.key, *(cells or [""] * (2 * top)), row.fault])
    return text.getvalue()


def _as_json(row: Prediction) -> dict[str, object]:
    if row.fault:
        return {"key": row.key, "error": row.fault}
    return {"key": row.key, "classes": [{"class": name, "probability": p} for name, p in row.classes]}
