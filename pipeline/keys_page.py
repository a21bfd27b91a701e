"""The keys of commands as text: for a terminal, and as the page docs/keys.md."""

from collections.abc import Mapping

from pydantic import BaseModel

from pipeline.keys import Key, keys_of

_INTRODUCTION = """# Keys

Every key of every command that takes `key=value`. This page is written by `make keys` from the config classes, and a
test compares the two. `mrmae pretrain --keys` prints the part of one command, `mrmae pretrain --print-config ...` the
values that a call would use. [configuration.md](configuration.md) says how values are written.

NAME is a name of your choice. A section is given by its keys; "or its path" means that text in place of the section
gives that key: `data=photos` is `data.path=photos`.
"""


def keys_text(cls: type[BaseModel]) -> str:
    """A line for each key: name, type, default, meaning."""
    rows = [(key.name, key.type, key.default, key.meaning) for key in keys_of(cls)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*(row[column].ljust(widths[column]) for column in range(3)), row[3]]) for row in rows]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def keys_page(commands: Mapping[str, type[BaseModel]]) -> str:
    """The Markdown page: a table for each command."""
    return "\n".join([_INTRODUCTION, *(_table(command, cls) for command, cls in commands.items())])


def _table(command: str, cls: type[BaseModel]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|", *map(_row, keys_of(cls))]
    return "\n".join([f"## {command}", "", *rows, ""])


def _row(key: Key) -> str:
    default = f"`{key.default}`" if key.default not in ("", "required") else key.default
    cells = (f"`{key.name}`", key.type, default, key.meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
