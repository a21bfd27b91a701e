"""Strict YAML to typed config: file, then `key=value` overrides, then validation that names the key.

    config = load_config(PretrainConfig, Path("configs/imagenet.yaml"), ["batch_size=256"], section="pretrain")

A file may describe one command, or a whole chain with a section for each command (`pretrain:`, `knn:`, ...) beside
values that the sections share by interpolation. Config classes lie in `pipeline/configs/` and `stages/configs/` and
derive from `Config`.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict, ValidationError, model_validator
from yaml import MarkedYAMLError, YAMLError

from pipeline.config_errors import explain
from pipeline.errors import ConfigError
from pipeline.files import write_text
from pipeline.keys import main_key, section_of
from pipeline.locations import check_url, is_text, is_url
from pipeline.overrides import read_overrides


class Config(BaseModel):
    """Base of every config: unknown keys and wrong types are errors, and values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)

    main_key: ClassVar[str] = ""  # what text in place of the section gives: data=photos is data.path=photos

    @model_validator(mode="before")
    @classmethod
    def _fill_sections(cls, values: Any) -> Any:
        """A section that is given in part keeps the rest of this command's default: one key is no other recipe."""
        values = _spread(cls, values)
        if not isinstance(values, dict):
            return values
        for name, value in values.items():
            if isinstance(value, str | Path) and not is_text(str(value)):
                raise ValueError(f"{name}={str(value)!a} is no valid Unicode text: give it another name")
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
    | {"demo", "plan", "ablate", "bootstrap", "embed", "predict", "segment"}
)


def _fill(default: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    nested = [key for key, value in given.items() if isinstance(value, dict) and isinstance(default.get(key), dict)]
    return {**default, **given, **{key: _fill(default[key], given[key]) for key in nested}}


def _expand(value: object) -> object:
    if isinstance(value, str) and is_url(value):
        raise ValueError(f"{value} is no local path, which this needs: `mrmae cache-copy` copies a cache to one")
    return Path(os.path.expanduser(value)) if isinstance(value, str) and value else value


def _locate(value: object) -> object:
    return check_url(value) if isinstance(value, str) and is_url(value) else _expand(value)


def _amount(value: object) -> object:
    found = re.fullmatch(r"([0-9]*\.?[0-9]+) ?([kmgt]?)b?", value.lower()) if isinstance(value, str) else None
    if found:
        value = round(float(found[1]) * 1000 ** " kmgt".index(found[2] or " "), 6)
    return int(value) if isinstance(value, float) and value.is_integer() else value


PathField = Annotated[Path, BeforeValidator(_expand)]
LocationField = Annotated[Path | str, BeforeValidator(_locate)]  # a str is a URL
Amount = Annotated[int, BeforeValidator(_amount)]  # decimal units are understood: 300k, 1.28M, 50GB
Precision = Literal["auto", "bf16", "fp32"]  # auto: bf16 on CUDA, fp32 on CPUs
Pair = Annotated[tuple[float, float], Strict(False)]


def load_config(cls: type[C], file: Path | None = None, overrides: Sequence[str] = (), section: str = "") -> C:
    """Merge a YAML file (its `section`, if it has one) with `a.b=c` overrides and validate the result as `cls`.

    `pipeline.overrides` says how the overrides are read; `${oc.env:NAME,default}` and `${other.key}` interpolate, from
    the root of the file.

    Raises:
        ConfigError: naming the key and what it allows.
    """
    root = _read_yaml(file) if file is not None else OmegaConf.create({})
    changes = read_overrides(cls, overrides)
    sections = [str(key) for key in root if key in _SECTIONS and key not in cls.model_fields]
    if sections and section and section not in root and file is not None:
        raise ConfigError(f"--config {file} has no section '{section}' (it has {', '.join(sections)})")
    if section in root and root[section] is None:  # all of its keys are commented out
        root[section] = {}
    if section in root and not OmegaConf.is_dict(root[section]):
        raise ConfigError(f"--config {file}: expected keys and values in section '{section}'")
    try:
        described = root.get(section, root)
        _spread_nodes(cls, described)
        merged = OmegaConf.merge(described, changes)
        if section in root:
            root[section] = merged
            merged = root[section]  # interpolations in it still see the values beside it
        values = OmegaConf.to_container(merged, resolve=True)
    except GrammarParseError as error:
        raise ConfigError(
            "config: a value holds '${', which begins an interpolation: write ${key} or ${oc.env:NAME}, or another name"
        ) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"config: {_first_line(error)}") from error
    return validate(cls, values)


def validate(cls: type[C], values: Any) -> C:
    """The config of these values. Raises ConfigError, naming the keys that are wrong and what they allow."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(cls, error)) from error


def config_text(config: Config) -> str:
    """The resolved config as YAML, which `load_config` reads again."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def save_config(config: Config, file: Path) -> None:
    """Write the resolved config as YAML, for a run folder."""
    write_text(file, config_text(config))


def _spread(cls: type[BaseModel], values: Any) -> Any:
    """Text in place of a section, or of a section of it, as the main key of that section."""
    if isinstance(values, str) and main_key(cls):
        return {main_key(cls): values}
    if not isinstance(values, dict):
        return values
    sections = {name: section_of(cls.model_fields[name].annotation) for name in values if name in cls.model_fields}
    return values | {name: _spread(section, values[name]) for name, section in sections.items() if section is not None}


def _spread_nodes(cls: type[BaseModel], node: DictConfig) -> None:
    """As `_spread`, in a file's values, so that an override of another key of the section doesn't replace the text."""
    for name in [str(key) for key in node if key in cls.model_fields]:
        section = section_of(cls.model_fields[name].annotation)
        if section is None or OmegaConf.is_missing(node, name):
            continue
        if OmegaConf.is_dict(node[name]) and not OmegaConf.is_interpolation(node, name):
            _spread_nodes(section, node[name])
        elif isinstance(node[name], str):
            node[name] = _spread(section, node[name])


def _read_yaml(file: Path) -> DictConfig:
    if not file.is_file():
        raise ConfigError(f"--config {file}: no such file")
    try:
        loaded = OmegaConf.load(file)
    except MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ConfigError(
            f"--config {file}{line} is not readable YAML ({error.problem}): quote texts that hold *, {{, [, # or :"
        ) from error
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"--config {file} is not readable YAML: {_first_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"--config {file}: expected keys and values at the top")
    return loaded


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
