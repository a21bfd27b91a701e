"""What commands left in their output folders, read for a page that compares them.

Folders of earlier versions lack some of the files or keys; what is missing is empty.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pipeline.errors import CheckpointError
from pipeline.evaluation.records import read_records
from pipeline.training.metrics import read_metrics


@dataclass(frozen=True)
class Output:
    """A folder that holds a training (`rows`), results of evaluations (`records`), or both.

    Attributes:
        name: the end of its path, as long as it takes to differ from the others.
        rows: of metrics.jsonl; each has a step.
        config: config.yaml, nested; its text beside it.
        starts: of starts.jsonl, the oldest first.
        records: of metrics.json.
    """

    name: str
    path: Path
    rows: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]
    config_text: str
    starts: Sequence[Mapping[str, Any]]
    records: Mapping[str, Any]


def find_outputs(roots: Sequence[Path]) -> list[Output]:
    """The output folders among `roots` and up to two levels below, each once, in the order of the roots.

    Raises:
        CheckpointError: a root doesn't exist or holds nothing, or a file of it is damaged.
    """
    folders: dict[Path, None] = {}
    for root in roots:
        if not root.is_dir():
            raise CheckpointError(f"{root} does not exist: give the output folder of pretrain, finetune or demo")
        files = [
            file
            for below in ("", "*/", "*/*/")
            for name in ("metrics.jsonl", "metrics.json")
            for file in root.glob(below + name)
        ]
        if not files and not read_records(root / "results.json"):
            raise CheckpointError(f"{root} holds no run (no metrics.jsonl, no metrics.json): give an output folder")
        folders |= dict.fromkeys(sorted({file.parent.resolve() for file in files}))
    return [_read(folder, name) for folder, name in distinct_names(list(folders)).items()]


def distinct_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Each path with the shortest end of it that no other one has; the paths are absolute and differ."""
    parts = dict.fromkeys(paths, 1)
    while True:
        names = {path: str(Path(*path.parts[-parts[path] :])) for path in paths}
        count = Counter(names.values())
        doubled = [path for path, name in names.items() if count[name] > 1]
        if not doubled:
            return names
        for path in doubled:
            parts[path] += 1


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones; an empty section is a value."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read(folder: Path, name: str) -> Output:
    text = _text(folder / "config.yaml")
    rows = [row for row in _lines(folder / "metrics.jsonl") if isinstance(row.get("step"), int)]
    starts, records = _lines(folder / "starts.jsonl"), read_records(folder / "metrics.json")
    return Output(name, folder, rows, _parse(text), text, starts, records)


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        rows = read_metrics(file)
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}): take the bad line out") from error
    return [row for row in rows if isinstance(row, dict)]


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _parse(text: str) -> dict[str, Any]:
    """The keys of a config.yaml; none where it is no such file."""
    try:
        config = OmegaConf.create(text)
        values = OmegaConf.to_container(config) if isinstance(config, DictConfig) else {}
    except (YAMLError, OmegaConfBaseException, ValueError):
        return {}
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}
