"""metrics.json in an output folder: the results of evaluations, one entry for each command, written whole."""

import json
from pathlib import Path
from typing import Any

from pipeline.files import write_text
from pipeline.processes import processes


def write_record(folder: Path | None, name: str, metrics: dict[str, Any]) -> None:
    """Put `metrics` under `name` into folder/metrics.json. The first process writes; without a folder nobody does."""
    if folder is None or not processes().is_main_process:
        return
    file = folder / "metrics.json"
    write_text(file, json.dumps({**read_records(file), name: metrics}, indent=1) + "\n")


def read_records(file: Path) -> dict[str, Any]:
    """The entries of a metrics.json; none where there is no such file, or another program's."""
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return records if isinstance(records, dict) else {}
