"""The keys of a config class: their types, defaults and meanings, read from the class itself.

    for key in keys_of(PretrainConfig):
        print(key.name, key.type, key.default, key.meaning)

The meaning of a field is the comment beside it, or right above it, in the source of its class.
"""

import ast
import inspect
import io
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_NAMES: dict[Any, str] = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}
_BEYOND = 2**63  # a bound that only the machine sets
_BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}"}


class Key(NamedTuple):
    """One key, as a user may give it; `name` holds NAME where the user chooses a name."""

    name: str
    type: str
    default: str
    meaning: str
    choices: tuple[str, ...] = ()


def members(annotation: Any) -> list[Any]:
    """The types that a union consists of, or the type alone; `Annotated` is taken off."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [member for argument in typing.get_args(annotation) for member in members(argument)]
    return [annotation]


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The config class that a field holds, if it holds one."""
    classes = (member for member in members(annotation) if isinstance(member, type) and not typing.get_args(member))
    return next((member for member in classes if issubclass(member, BaseModel)), None)


def main_key(section: type[BaseModel]) -> str:
    """The key of a section that plain text in its place gives, as in data=photos; empty if there is none."""
    return str(getattr(section, "main_key", ""))


def values_of(annotation: Any) -> Any:
    """The type of a dict's values, under names that the user chooses; None if the field holds no dict."""
    return next((typing.get_args(member)[1] for member in members(annotation) if _origin(member) is dict), None)


def items_of(annotation: Any) -> Any:
    """The type of a list's items; None if the field holds no list."""
    return next(
        (typing.get_args(member)[0] for member in members(annotation) if _origin(member) in (list, tuple)), None
    )


def is_optional(annotation: Any) -> bool:
    return types.NoneType in members(annotation)


def is_text(annotation: Any) -> bool:
    """Whether a field holds text, a path or one of several words, and nothing else but None."""
    return all(
        member in (str, Path) or all(isinstance(choice, str) for choice in _choices(member) or (None,))
        for member in members(annotation)
        if member is not types.NoneType
    )


def annotation_at(annotation: Any, path: Sequence[str]) -> Any:
    """The type of the key a.b.c below a config class; None if there is no such key."""
    for part in path:
        section = section_of(annotation)
        if section is not None:
            field = section.model_fields.get(part)
            annotation = field.annotation if field else None
        else:
            annotation = values_of(annotation)
        if annotation is None:
            return None
    return annotation


def keys_of(cls: type[BaseModel], prefix: str = "", defaults: BaseModel | None = None) -> Iterator[Key]:
    """Every key of a config class, those of its sections after the section itself.

    Args:
        defaults: the section as the config that holds it has it by default; the class's own defaults count without.
    """
    meanings = _meanings(cls)
    for name, field in cls.model_fields.items():
        default = _default(field, name, defaults)
        annotation, named = field.annotation, values_of(field.annotation)
        section = section_of(named if named is not None else annotation)
        meaning = meanings.get(name) or (_first_sentence(section) if section else "")
        if section is None:
            choices = tuple(str(choice) for member in members(annotation) for choice in _choices(member))
            yield Key(prefix + name, _type(annotation, field), default, meaning, choices)
            continue
        short = f", or its {main_key(section)}" if main_key(section) else ""
        kind = f"sections by name{short}" if named is not None else f"section{short}"
        yield Key(prefix + name, kind, default, meaning)
        value = getattr(defaults, name) if defaults else field.default
        below = f"{prefix}{name}.NAME." if named is not None else f"{prefix}{name}."
        yield from keys_of(section, below, value if isinstance(value, BaseModel) else None)


def _origin(member: Any) -> Any:
    return typing.get_origin(member)


def _choices(member: Any) -> tuple[Any, ...]:
    return typing.get_args(member) if _origin(member) is Literal else ()


def _default(field: FieldInfo, name: str, defaults: BaseModel | None) -> str:
    if defaults is None and field.is_required():
        return "required"
    value = getattr(defaults, name) if defaults else field.get_default(call_default_factory=True)
    return "" if isinstance(value, BaseModel) else shown(value)


def shown(value: Any) -> str:
    """A value as it is written behind `=`."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, BaseModel):
        return shown(value.model_dump(mode="json", exclude_defaults=True))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(shown, value)) + "]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _type(annotation: Any, field: FieldInfo | None = None) -> str:
    bounds = [
        text.format(getattr(limit, name))
        for limit in (field.metadata if field else ())
        for name, text in _BOUNDS.items()
        if hasattr(limit, name) and getattr(limit, name) < _BEYOND
    ]
    names = [_name(member) for member in members(annotation) if member is not types.NoneType]
    if is_optional(annotation):
        names.append("null")
    return " or ".join([", ".join([names[0], *bounds]), *names[1:]])


def _name(member: Any) -> str:
    if _choices(member):
        return " or ".join(map(str, _choices(member)))
    if items_of(member) is not None:
        return f"list of {_type(items_of(member))}"
    if values_of(member) is not None:
        return f"{_type(values_of(member))} by name"
    section = section_of(member)
    return "section" if section else _NAMES.get(member, member.__name__)


def _first_sentence(cls: type[BaseModel]) -> str:
    return inspect.getdoc(cls).partition("\n")[0].rstrip(".") if cls.__doc__ else ""  # type: ignore[union-attr]


def _meanings(cls: type[BaseModel]) -> dict[str, str]:
    """What the comments of the class say of its fields, and those of its bases where it says nothing."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if issubclass(base, BaseModel) and base.__module__.split(".")[0] != "pydantic":
            found |= _comments(base)
    return found


@cache
def _comments(cls: type[BaseModel]) -> dict[str, str]:
    lines = inspect.getsource(cls).splitlines(keepends=True)
    comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO("".join(lines)).readline)
        if token.type == tokenize.COMMENT
    }
    body = ast.parse("".join(lines)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno is not None:
            first = node.lineno
            while lines[first - 2].strip().startswith("#"):
                first -= 1
            texts = [comments[line] for line in range(first, node.end_lineno + 1) if line in comments]
            text = " ".join(text for text in map(_without_directives, texts) if text)
            if text:
                found[node.target.id] = text
    return found


def _without_directives(comment: str) -> str:
    """A comment without what it tells mypy, as in `type: ignore[assignment]  # one classifier or several`."""
    return comment.partition("#")[2].strip() if comment.startswith("type:") else comment


def completions(cls: type[BaseModel], begun: str) -> Iterator[tuple[str, str]]:
    """(word, meaning) of what a shell may complete `begun` to: `key=`, or `key=choice`."""
    for key in keys_of(cls):
        is_bare = key.type == "section" or "NAME" in key.name.split(".") or key.type.startswith("sections")
        words = [f"{key.name}={choice}" for choice in key.choices] if "=" in begun else [f"{key.name}="]
        yield from ((word, key.meaning) for word in words if word.startswith(begun) and not is_bare)
