"""metrics.json in an output folder: the results of evaluations, one entry for each command, written whole.

Beside its figures an entry has `made`: when, by which command, on which device and versions (`pipeline.provenance`).
"""

import json
import logging
from pathlib import Path
from typing import Any

from pipeline.files import write_text
from pipeline.locks import taking_turns
from pipeline.processes import processes
from pipeline.provenance import describe_process

log = logging.getLogger(__name__)


def write_record(folder: Path | None, name: str, metrics: dict[str, Any]) -> None:
    """Put `metrics` under `name` into folder/metrics.json. The first process writes; without a folder nobody does.

    Commands that end at the same time keep each other's entries. A file that holds none is set aside, not overwritten.
    """
    if folder is None or not processes().is_main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "metrics.json"
    with taking_turns(file):
        records = _parse(file)
        if records is None:
            aside = file.with_name("metrics.json.damaged")
            log.warning("%s holds no results: it is kept as %s", file, aside)
            file.replace(aside)
        entry = {**metrics, "made": describe_process()}
        write_text(file, json.dumps({**(records or {}), name: entry}, indent=1) + "\n")


def read_records(file: Path) -> dict[str, Any]:
    """The entries of a metrics.json; none where there is no such file, or another program's."""
    return _parse(file) or {}


def _parse(file: Path) -> dict[str, Any] | None:
    """The entries; None where the file holds something else."""
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError:
        return None
    return records if isinstance(records, dict) else None
