"""Names of classes that a data set knows by number alone."""

import json
from pathlib import Path

from pipeline.errors import DataError


def read_class_names(file: Path, count: int) -> tuple[str, ...]:
    """The names of `count` classes, by number: a JSON list, a JSON mapping of numbers to names, or a name a line.

    Raises:
        DataError: no such file, another number of names, or one twice.
    """
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise DataError(
            f"class_names={file} can't be read ({error}): give a JSON list, or a text of a name a line"
        ) from (error)
    if isinstance(content, dict):
        content = [content.get(str(number)) for number in range(len(content))]
    if not isinstance(content, list) or not all(isinstance(name, str) and name for name in content):
        raise DataError(
            f"class_names={file}: give a JSON list of names, a mapping of numbers from 0 on to names, or lines"
        )
    if len(content) != count or len(set(content)) != count:
        raise DataError(f"class_names={file} holds {len(set(content))} names, and there are {count} classes")
    return tuple(content)
