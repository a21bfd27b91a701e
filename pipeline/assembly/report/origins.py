"""Where runs and results come from, as a page tells it: commands, dates and machines, but no hosts."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.assembly.report.comparing import stage_of
from pipeline.assembly.report.outputs import Output
from pipeline.evaluation.curves import LineStyle
from pipeline.evaluation.page import Name, Origin


def find_origins(outputs: Sequence[Output], styles: Mapping[str, LineStyle]) -> list[Origin]:
    """The commands, each with what it made and where it ran."""
    made = []
    for output in outputs:
        style = styles.get(output.name)
        made += [(Name(f"{output.name}: {stage_of(output) or 'training'}", style), start) for start in output.starts]
        made += [
            (Name(f"{output.name}: {what.replace('_', ' ')}", style), record["made"])
            for what, record in output.records.items()
            if isinstance(record, dict) and isinstance(record.get("made"), dict)
        ]
    origins: dict[tuple[str, str], dict[Name, list[str]]] = {}
    for name, facts in made:
        origins.setdefault((_command(facts), _machine(facts)), {}).setdefault(name, []).append(minute(facts))
    return [
        Origin([Name(f"{name.name}, {_dates(dates)}", name.style) for name, dates in names.items()], machine, command)
        for (command, machine), names in origins.items()
    ]


def _dates(dates: Sequence[str]) -> str:
    return dates[0] if len(dates) == 1 else f"{len(dates)} starts from {dates[0]} to {dates[-1]}"


def _command(facts: Mapping[str, Any]) -> str:
    """As it was typed, but for where the program lies."""
    text = str(facts.get("command", ""))
    try:
        program, *words = shlex.split(text)
    except ValueError:  # no words, or none that a shell wrote
        return text
    return shlex.join([Path(program).name, *words])


def _machine(facts: Mapping[str, Any]) -> str:
    """Device and versions; no host."""
    versions = facts.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    parts = [str(facts.get("device", "–"))]
    if isinstance(count := facts.get("processes"), int) and count > 1:
        parts.append(f"{count} processes")
    parts += [f"{name} {versions[name]}" for name in ("torch", "mrmae") if versions.get(name)]
    if facts.get("commit"):
        parts.append(f"commit {str(facts['commit'])[:10]}")
    return ", ".join(parts)


def minute(facts: Any) -> str:
    """The minute of a recorded time."""
    time = facts.get("time") if isinstance(facts, Mapping) else None
    return str(time)[:16].replace("T", " ") if time else "–"
