"""`key=value` words of a command line: what stands behind `=` is read by the type of the key.

| type of the key | what stands behind `=` |
|---|---|
| text, a path, one of several words | is taken as it stands: `data.path=*.tar`, `output=2024`, `data.path=photos #2` |
| a list of these | one text, or `[a,b]`: texts between commas |
| a section with a main key | the main key's text: `data=photos` is `data.path=photos`; or `{key: value}` |
| anything else | is YAML: numbers, true and false, lists, `{key: value}` |

`null` is none wherever none is allowed. `${key}` and `${oc.env:NAME}` are filled in later, in all of them.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf
from pydantic import BaseModel
from yaml import YAMLError

from pipeline.errors import ConfigError
from pipeline.keys import annotation_at, is_optional, is_text, items_of, main_key, section_of


def read_overrides(cls: type[BaseModel], words: Sequence[str]) -> dict[str, Any]:
    """The words as nested keys and values of the config class `cls`.

    Raises:
        ConfigError: a word without `=`, a key that is given more than once, a value that can't be read.
    """
    values: dict[str, Any] = {}
    given: set[tuple[str, ...]] = set()
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{word}' is no override: write key=value, for instance batch_size=256")
        path, value = _read(cls, tuple(key.split(".")), text)
        if path in given:  # as when a shell expands braces, and all words but the last would be lost
            raise ConfigError(
                f"{key}=... is given more than once: give it once; quote a pattern: '{key}=...{{00..09}}'"
            )
        given.add(path)
        _put(values, path, value)
    return values


def override_words(values: Mapping[str, Any], section: str = "") -> list[str]:
    """Nested keys and values, as `model_dump(mode="json")` gives them, as words: what `read_overrides` reads."""
    words = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            words += override_words(value, f"{section}{name}.")
        else:
            words.append(f"{section}{name}={value if isinstance(value, str) else json.dumps(value)}")
    return words


def _read(cls: type[BaseModel], path: tuple[str, ...], text: str) -> tuple[tuple[str, ...], Any]:
    """The key that is meant, and its value."""
    annotation = annotation_at(cls, path)
    if annotation is None:
        return path, _yaml(path, text)  # an unknown key, which is named later
    if text == "null" and is_optional(annotation):
        return path, None
    section, items = section_of(annotation), items_of(annotation)
    is_whole = text.startswith("${") or (_is_between(text, "{}") and ":" in text)
    if section is not None and main_key(section) and not is_whole:
        path, annotation, section = (*path, main_key(section)), str, None
    if section is None and is_text(annotation):
        key = ".".join(path)
        if text == "???":  # which a file uses for a value that isn't there, and which would give way to the file's own
            raise ConfigError(f"{key}=???: write ./??? for a file or folder of three characters")
        if not text:
            raise ConfigError(f"{key}= is given without a value: is a variable of the shell empty? Write {key}=VALUE")
        return path, text
    if items is not None and is_text(items):
        texts = text[1:-1].split(",") if _is_between(text, "[]") else [text]
        return path, [item for item in (_unquoted(part.strip()) for part in texts) if item]
    return path, _yaml(path, text)


def _is_between(text: str, brackets: str) -> bool:
    return text.startswith(brackets[0]) and text.endswith(brackets[1])


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _yaml(path: tuple[str, ...], text: str) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index,call-overload]
    except YAMLError as error:
        raise ConfigError(
            f"{'.'.join(path)}={text}: neither a number nor true, false, [a,b] or {{key: value}}; is a bracket missing?"
        ) from error


def _put(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    *sections, name = path
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            inner = values[section] = {}
        values = inner
    if isinstance(value, dict) and isinstance(values.get(name), dict):
        value = {**value, **values[name]}
    values[name] = value
