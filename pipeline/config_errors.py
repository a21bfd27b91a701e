"""What is wrong with a config, in one line that names the key as a user gives it."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.errors import wanted
from pipeline.keys import Key, annotation_at, items_of, keys_of, main_key, section_of, shown, values_of

_SHOWN = 4  # keys in a suggestion
_FEW = 2


def explain(cls: type[BaseModel], error: ValidationError) -> str:
    """Every problem of a validation, `; ` between them."""
    problems: dict[str, list[str]] = {}
    for problem in error.errors():
        path = _path(cls, problem["loc"])
        key = ".".join(path)
        if problem["type"] == "extra_forbidden":
            problems[f"unknown key '{key}' ({suggest_keys(cls, path)})"] = []
        elif problem["type"] == "missing" and isinstance(problem["loc"][-1], int):
            problems[f"{key}: a value is missing"] = []
        elif problem["type"] == "missing":
            problems[f"'{key}' is missing: give {_example(cls, path)}"] = []
        elif problem["type"] == "value_error":
            text = problem["msg"].removeprefix("Value error, ")
            problems[f"{key}: {text}" if key else text] = []
        else:
            problems.setdefault(f"{key}={_shown(problem['input'])}: ", []).append(_wanted(cls, path, problem))
    return "config: " + "; ".join(start + _either(texts) for start, texts in problems.items())


def _either(texts: Sequence[str]) -> str:
    """What the members of a union want, as in: must be true or false or 'loss'."""
    return " or ".join(dict.fromkeys(texts)).replace(" or must be", " or")


def suggest_keys(cls: type[BaseModel], path: Sequence[str]) -> str:
    """Keys that an unknown one may stand for: of this name at any depth, or of a similar one; else those beside it."""
    section = ".".join(path[:-1])
    keys = _by_nearness(cls)
    beside = [key for key in keys if key.name.rpartition(".")[0] == section]
    named, similar = _named(keys, path[-1]), _similar(beside, path[-1])
    if section and len(named) > _FEW:
        named = []  # a name as common as `path` says nothing of what was meant in this section
    found = named or similar or ([] if section else _similar(keys, path[-1]))
    if found:
        return _did_you_mean(found)
    return "known here: " + ", ".join(key.name.rpartition(".")[2] for key in beside)


def _did_you_mean(names: Sequence[str]) -> str:
    return "did you mean " + " or ".join(f"'{name}'" for name in names[:_SHOWN]) + "?"


def _by_nearness(cls: type[BaseModel]) -> list[Key]:
    """Keys as they are likely to be meant: those of sections that are there by default, then the others; by depth."""
    keys = list(keys_of(cls))
    absent = tuple(f"{key.name}." for key in keys if "section" in key.type and key.default in ("null", "{}"))
    return sorted(keys, key=lambda key: (key.name.startswith(absent), key.name.count(".")))


def _named(keys: Sequence[Key], name: str) -> list[str]:
    return [key.name for key in keys if key.name.rpartition(".")[2] == name]


def _similar(keys: Sequence[Key], name: str) -> list[str]:
    names = [key.name.rpartition(".")[2] for key in keys]
    near = difflib.get_close_matches(name.replace("-", "_").lower(), names, n=1)
    return _named(keys, near[0]) if near else []


def _path(cls: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """The key at an error's place, without the names of union members that pydantic puts between its parts."""
    path: list[str] = []
    annotation: Any = cls
    for part in loc:
        section, values, items = section_of(annotation), values_of(annotation), items_of(annotation)
        if isinstance(part, int):
            annotation = items
        elif section is not None:
            annotation = section.model_fields[part].annotation if part in section.model_fields else None
        elif values is not None and part != "[key]":
            annotation = values
        else:
            continue
        path.append(str(part))
    return path


def _example(cls: type[BaseModel], path: Sequence[str]) -> str:
    """How to give a key that is missing: a section by its main key, or by all that it requires."""
    key, section = ".".join(path), section_of(annotation_at(cls, path))
    if section is None or main_key(section):
        return f"{key}=..."
    required = [below.name for below in keys_of(section) if below.default == "required" and "." not in below.name]
    return " ".join(f"{key}.{name}=..." for name in required) or f"{key}.KEY=..."


def _wanted(cls: type[BaseModel], path: Sequence[str], problem: Mapping[str, Any]) -> str:
    if problem["type"].startswith("model"):
        return f"is a section: give its keys, as in {_example_below(cls, path)}"
    text = wanted(problem)
    return f"{text}: in a file, put it in quotes" if text in ("must be text", "must be a path") else text


def _example_below(cls: type[BaseModel], path: Sequence[str]) -> str:
    annotation = annotation_at(cls, [part for part in path if not part.isdigit()])
    section = section_of(annotation)
    names = [key.name for key in keys_of(section)][:1] if section is not None else []
    return ".".join([*path, *names]) + "=..."


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else shown(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def explain_option(cls: type[BaseModel], option: str, words: Sequence[str], near: Sequence[str]) -> str:
    """What to write in place of an option that there isn't, such as `--batch_size 60`.

    Args:
        near: options that look like it.
    """
    place = next(place for place, word in enumerate(words) if word.startswith(option))
    name, equals, value = words[place].partition("=")
    if not equals:
        following = words[place + 1] if place + 1 < len(words) else ""
        value = following if following and not following.startswith("-") and "=" not in following else "VALUE"
    path = name.lstrip("-").replace("-", "_").split(".")
    start = f"there is no option {name}: keys are given without dashes, as key=value"
    if annotation_at(cls, path) is not None:
        return f"{start}: write {'.'.join(path)}={value}"
    if near and not _named(list(keys_of(cls)), path[-1]):
        return f"there is no option {name}: {_did_you_mean(near)}"
    return f"{start} ({suggest_keys(cls, path)})"
