"""metrics.json in an output folder: what evaluations found, one entry a command, added to and never half-written."""

import json
from pathlib import Path
from typing import Any

from pipeline.files import write_text
from pipeline.processes import processes


def write_record(folder: Path | None, name: str, metrics: dict[str, Any]) -> None:
    """Put `metrics` under `name` into folder/metrics.json, by the first process; nothing without a folder."""
    if folder is None or not processes().is_main_process:
        return
    file = folder / "metrics.json"
    write_text(file, json.dumps({**read_records(file), name: metrics}, indent=1) + "\n")


def read_records(file: Path) -> dict[str, Any]:
    """The entries of a metrics.json; none where there is no such file, or another program's."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
