"""Lines about wrong configs: they name keys and say what is wanted, in the project's own words."""

import json
import re
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from pydantic import Field

import cli
from pipeline.config import Config, Pair, PathField, load_config, validate
from pipeline.errors import ConfigError
from pipeline.keys import keys_of

COMMANDS = [command for command in cli.STAGES if command.has_keys]
FOREIGN = re.compile(
    r"(?i:pydantic|validat|instance|\binput\b|function-|\[type=|field required|unhashable|omegaconf)|\w+Config\b"
)


class Photos(Config):
    """Which photos."""

    main_key: ClassVar[str] = "path"
    path: str
    limit: int | None = None


class Annotated(Config):
    """Photos and what is on them."""

    images: PathField
    annotations: PathField
    limit: int | None = None


class Net(Config):
    """The network."""

    image_size: int = 224
    drop: bool | Literal["loss"] = False
    sizes: list[int] = Field(default=[1])
    betas: Pair = (0.9, 0.99)
    weights: dict[str, float] = Field(default={})


class Training(Config):
    """Everything that it takes."""

    data: Photos
    val: Annotated | None = None
    net: Net = Net()
    other: Net | None = None
    batch_size: int = 8


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "'data' is missing: give data=..."),
        (["data=x", "image_size=6"], "unknown key 'image_size' (did you mean 'net.image_size' or 'other.image_size'?)"),
        (["data=x", "imagesize=6"], "unknown key 'imagesize' (did you mean 'net.image_size' or 'other.image_size'?)"),
        (["data=x", "net.batch_size=64"], "unknown key 'net.batch_size' (did you mean 'batch_size'?)"),
        (["data=x", "net.image-size=64"], "unknown key 'net.image-size' (did you mean 'net.image_size'?)"),
        (["data=x", "batch-size=64"], "unknown key 'batch-size' (did you mean 'batch_size'?)"),
        (["data=x", "zoo=1"], "unknown key 'zoo' (known here: data, val, net, other, batch_size)"),
        (["data=x", "data.zoo=1"], "unknown key 'data.zoo' (known here: path, limit)"),
        (["data=x", "val.limit=3"], "'val.images' is missing: give val.images=...; "
         "'val.annotations' is missing: give val.annotations=..."),
        (["data=x", "val=y"], "val='y': is a section: give its keys, as in val.images=..."),
        (["data=x", "net=3"], "net=3: is a section: give its keys, as in net.image_size=..."),
        (["data=x", "net.drop=maybe"], "net.drop='maybe': must be true or false or 'loss'"),
        (["data=x", "net.sizes=[1,a]"], "net.sizes.1='a': must be a whole number"),
        (["data=x", "net.sizes=3"], "net.sizes=3: must be a list: [a,b]"),
        (["data=x", "net.betas=[0.9]"], "net.betas.1: a value is missing"),
        (["data=x", "net.weights.a=b"], "net.weights.a='b': must be a number"),
        (["data=x", "net.weights=b"], "net.weights='b': must be keys and values: {name: value}"),
        (["data=x", "batch_size=2.5"], "batch_size=2.5: must be a whole number"),
        (["data=x", "batch_size=null"], "batch_size=null: must be a whole number"),
    ],
)  # fmt: skip
def test_the_line(words: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Training, None, words)
    assert str(caught.value) == f"config: {line}"


def test_text_in_a_file_wants_quotes(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("data: {path: 2024}\nval: {images: 1e3, annotations: yes}\n")
    with pytest.raises(ConfigError, match=r"data.path=2024: must be text: in a file, put it in quotes; val.images=1"):
        load_config(Training, file)


@pytest.mark.parametrize("text", ["photos\0", "photos\udcff"])
@pytest.mark.parametrize("values", [{"data": {"path": ""}}, {"data": "", "val": {"images": "", "annotations": "x"}}])
def test_text_that_can_not_be_written_down(text: str, values: dict[str, Any]) -> None:
    """A name on the disk that is no UTF-8, and what only a YAML file can hold."""
    values = json.loads(json.dumps(values).replace('""', json.dumps(text)))
    with pytest.raises(ConfigError, match=r"=.photos.* is no valid Unicode text: give it another name"):
        validate(Training, values)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_no_line_speaks_of_the_library(command: cli.Command) -> None:
    """Every key of every command, given values of every wrong kind."""
    config = command.load_class()
    keys, lines = list(keys_of(config)), []
    for key in keys:
        for value in ("''", "-1", "1e99", ".nan", "[]", "[[x]]", "[1,2,3,4,5,6,7]", "{a: 1}", "true", "x:y"):
            try:
                load_config(config, None, [f"{key.name}={value}"])
            except ConfigError as error:
                line = str(error).replace(f"{key.name}={value}", "")
                assert "\n" not in line
                assert not FOREIGN.search(re.sub(r"'[^']*'", "", line)), line
                assert "can't be taken" not in line, line
                lines.append(line)
    assert len(lines) >= len(keys)
