"""Strict YAML to typed config: file, then `key=value` overrides, then validation that names the key.

    config = load_config(PretrainConfig, Path("configs/imagenet.yaml"), ["batch_size=256"], section="pretrain")

A file may describe one command, or a whole chain with a section for each command (`pretrain:`, `knn:`, ...) beside
values that the sections share by interpolation. A config class lives beside the thing it configures and derives from
`Config`; a stage composes them.
"""

import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict, ValidationError, model_validator
from yaml import YAMLError

from pipeline.errors import ConfigError
from pipeline.files import write_text
from pipeline.locations import check_url, is_url


class Config(BaseModel):
    """Base of every config: unknown keys and wrong types are errors, and values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _fill_sections(cls, values: Any) -> Any:
        """A section that is given in part keeps the rest of this command's default: one key is no other recipe."""
        if not isinstance(values, dict):
            return values
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        filled = {
            name: _fill(defaults[name].model_dump(), given)
            for name, given in values.items()
            if isinstance(given, dict) and isinstance(defaults.get(name), Config)
        }
        return {**values, **filled}


C = TypeVar("C", bound=Config)

# A file with one of these at its root describes a chain, unless the command itself has such a key (`pretrain` has knn).
_SECTIONS = frozenset(
    {"extract-teacher-features", "pretrain", "finetune", "detect", "knn", "linear-probe", "visualize", "export"}
    | {"demo", "plan", "ablate"}
)


def _fill(default: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    nested = [key for key, value in given.items() if isinstance(value, dict) and isinstance(default.get(key), dict)]
    return {**default, **given, **{key: _fill(default[key], given[key]) for key in nested}}


def _expand(value: object) -> object:
    if isinstance(value, str) and is_url(value):
        raise ValueError(f"{value} is no local path, which this needs: `mrmae cache-copy` copies a cache to one")
    return Path(value).expanduser() if isinstance(value, str) and value else value


def _locate(value: object) -> object:
    return check_url(value) if isinstance(value, str) and is_url(value) else _expand(value)


PathField = Annotated[Path, BeforeValidator(_expand)]
LocationField = Annotated[Path | str, BeforeValidator(_locate)]  # a str is a URL
Precision = Literal["auto", "bf16", "fp32"]  # auto: bf16 on CUDA, fp32 on CPUs
Pair = Annotated[tuple[float, float], Strict(False)]


def load_config(cls: type[C], file: Path | None = None, overrides: Sequence[str] = (), section: str = "") -> C:
    """Merge a YAML file (its `section`, if it has one) with `a.b=c` overrides and validate the result as `cls`.

    Values in the overrides are read as YAML; `${oc.env:NAME,default}` and `${other.key}` interpolate, from the root of
    the file.

    Raises:
        ConfigError: naming the key and what it allows.
    """
    root = _read_yaml(file) if file is not None else OmegaConf.create({})
    given: set[str] = set()
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{override}' is no override: write key=value, for instance batch_size=256")
        if key in given:  # as when a shell expands braces, and all words but the last would be lost
            raise ConfigError(
                f"{key}=... is given more than once: give it once; quote a pattern: '{key}=...{{00..09}}'"
            )
        given.add(key)
    try:
        changes = OmegaConf.from_dotlist(list(overrides))
        sections = [str(key) for key in root if key in _SECTIONS and key not in cls.model_fields]
        if sections and section and section not in root and file is not None:
            raise ConfigError(f"--config {file} has no section '{section}' (it has {', '.join(sections)})")
        if section in root:
            if root[section] is None:  # all of its keys are commented out
                root[section] = {}
            if not OmegaConf.is_dict(root[section]):
                raise ConfigError(f"--config {file}: expected keys and values in section '{section}'")
            root[section] = OmegaConf.merge(root[section], changes)
            merged = root[section]  # interpolations in it still see the values beside it
        else:
            merged = OmegaConf.merge(root, changes)
        values = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"config: {_first_line(error)}") from error
    return validate(cls, values)


def validate(cls: type[C], values: object) -> C:
    """The config that these keys and values make.

    Raises:
        ConfigError: naming the key and what it allows.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(cls, error)) from error


def save_config(config: Config, file: Path) -> None:
    """Write the resolved config as YAML, for a run folder."""
    write_text(file, OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))


def _read_yaml(file: Path) -> DictConfig:
    if not file.is_file():
        raise ConfigError(f"--config {file}: no such file")
    try:
        loaded = OmegaConf.load(file)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file} is not readable YAML: {_first_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"--config {file}: expected keys and values at the top")
    return loaded


def _explain(cls: type[Config], error: ValidationError) -> str:
    problems = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"] if not _is_type_tag(part))
        if problem["type"] == "extra_forbidden":
            problems.append(f"unknown key '{key}'{_suggest(cls, problem['loc'])}")
        elif problem["type"] == "missing":
            problems.append(f"'{key}' is missing: give {key}=...")
        elif problem["type"] == "value_error":
            problems.append(f"{key}: {problem['msg'].removeprefix('Value error, ')}" if key else problem["msg"])
        else:
            problems.append(f"{key}={problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}")
    return "config: " + "; ".join(dict.fromkeys(problems))


def _suggest(cls: type[Config], loc: tuple[int | str, ...]) -> str:
    """Near misses among the keys of the section that holds the unknown one, else all of them."""
    section: type[Config] | None = cls
    for part in loc[:-1]:
        section = _section(section, str(part)) if section else None
    if section is None:
        return ""
    names = list(section.model_fields)
    near = difflib.get_close_matches(str(loc[-1]), names, n=1)
    return f" (did you mean '{near[0]}'?)" if near else f" (known here: {', '.join(names)})"


def _section(cls: type[Config], name: str) -> type[Config] | None:
    field = cls.model_fields.get(name)
    annotation: Any = field.annotation if field else None
    candidates = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Config)), None)


def _is_type_tag(part: int | str) -> bool:
    """pydantic puts a union member's name, such as `constrained-str` or `function-before[...]`, into the location."""
    return isinstance(part, str) and not part.isidentifier()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
