"""The keys of commands as text: for a terminal, and as the page docs/keys.md."""

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from pydantic import BaseModel

from pipeline.keys import Key, keys_of

ConfigClass: TypeAlias = type[BaseModel]

_INTRODUCTION = """# Keys

Every key of every command that takes `key=value`. This page is written by `make keys` from the config classes, and a
test compares the two. `mrmae pretrain --keys` prints the part of one command, `mrmae pretrain --print-config ...` the
values that a call would use. [configuration.md](configuration.md) says how values are written.

NAME is a name of your choice. A section is given by its keys; "or its path" means that text in place of the section
gives that key: `data=photos` is `data.path=photos`.
"""


def keys_text(cls: ConfigClass) -> str:
    """A line for each key: name, type, default, meaning."""
    rows = [(key.name, key.type, key.default, key.meaning) for key in keys_of(cls)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*(row[column].ljust(widths[column]) for column in range(3)), row[3]]) for row in rows]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def keys_page(commands: Mapping[str, ConfigClass], evaluations: Mapping[str, ConfigClass]) -> str:
    """The Markdown page: a table for each command, and what `COMMAND --eval` takes beside it."""
    parts = [_INTRODUCTION]
    for command, cls in commands.items():
        keys = list(keys_of(cls))
        parts.append(_table(command, keys))
        if command in evaluations:
            changed = [key for key in keys_of(evaluations[command]) if key not in keys]
            parts.append(
                _table(f"{command} --eval", changed, f"These keys beside those of `{command}`, or in their place.")
            )
    return "\n".join(parts)


def _table(heading: str, keys: Iterable[Key], lead: str = "") -> str:
    head = [
        f"## {heading}",
        "",
        *([lead, ""] if lead else []),
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *map(_row, keys), ""])


def _row(key: Key) -> str:
    default = f"`{key.default}`" if key.default not in ("", "required") else key.default
    cells = (f"`{key.name}`", key.type, default, key.meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
