"""What stands behind `=` on a command line, by the type of the key."""

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field, Strict

from pipeline.config import Config, PathField, config_text, load_config
from pipeline.errors import ConfigError


class Images(Config):
    """Which images."""

    main_key: ClassVar[str] = "path"
    path: str
    weights: str | None = None
    limit: int | None = None


class Command(Config):
    """Everything that it takes."""

    data: Images = Images(path="/default", limit=7)
    val: Images | None = None
    caches: dict[str, Images] = Field(default={})
    output: PathField = Path("out")
    names: list[str] = Field(default=[])
    files: Annotated[tuple[PathField, ...], Strict(False)] = ()
    kind: Literal["full", "none"] = "full"
    drop: bool | Literal["loss"] = False
    rate: float = 1.0
    sizes: list[int] = Field(default=[])


# What YAML reads as a list, a mapping, a number, a date, true, nothing, a comment, an alias, a tag or an error
TEXTS = [
    *("*.tar", "{00..01}.tar", "{a,b}", "2024", "0123", "1e3", "1_000", "0x1F", ".5", "12:30:00", "2024-01-31"),
    *("yes", "no", "on", "off", "true", "False", "null", "Null", "~", ".nan", ".inf", "?.*", "-", "- a", "="),
    *("photos #2", "#photos", "a: b", "a:", ": a", "@set", "`set`", "%set", "&set", "!set", "|", ">", "?", "? a", ","),
    *("[x]", "[x", "x]", "{x", "x}", "'a'", '"a"', "'", '"', "a=b", "=a", " a ", "a\tb"),
    *("~nobody/a", "\\", "C:\\set", "ä", "a$b"),
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_stands(text: str, tmp_path: Path) -> None:
    config = load_config(Command, None, [f"data.path={text}", f"output={text}", f"caches.a.path={text}"])
    assert (config.data.path, config.output, config.caches["a"].path) == (text, Path(os.path.expanduser(text)), text)
    assert config.data.limit == 7  # the rest of the section's default stays
    file = tmp_path / "config.yaml"
    file.write_text(config_text(config))
    assert load_config(Command, file) == config
    file.write_text("data: {path: /other}\noutput: /other\n")
    assert load_config(Command, file, [f"data.path={text}", f"output={text}"]).data.path == text


def test_null_is_none_where_none_is_allowed(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("data: {path: /x, weights: file, limit: 3}\nval: {path: /y}\n")
    config = load_config(Command, file, ["data.weights=null", "data.limit=null", "val=null", "data.path=null"])
    assert config.data == Images(path="null")
    assert config.val is None
    assert load_config(Command, file, ["data.weights=./null"]).data.weights == "./null"
    assert load_config(Command, file, ["data.weights=~"]).data.weights == "~"


def test_a_path_below_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert load_config(Command, None, ["output=~/2024"]).output == Path("/home/me/2024")


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("names=2024", ["2024"]),
        ("names=[2024,yes]", ["2024", "yes"]),
        ("names=[a #2, 'b']", ["a #2", "b"]),
        ("names=[]", []),
        ("names=*.jpg", ["*.jpg"]),
    ],
)
def test_a_list_of_texts(word: str, values: list[str]) -> None:
    assert load_config(Command, None, [word]).names == values
    assert load_config(Command, None, [word.replace("names", "files")]).files == tuple(map(Path, values))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("data=photos", Images(path="photos", limit=7)),
        ("data=photos #2", Images(path="photos #2", limit=7)),
        ("data={00..01}.tar", Images(path="{00..01}.tar", limit=7)),
        ("data={path: photos, limit: 3}", Images(path="photos", limit=3)),
        ("data=${val}", Images(path="/y", limit=2)),
    ],
)
def test_a_section_given_as_text_is_its_main_key(word: str, expected: Images, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("val: {path: /y, limit: 2}\n")
    assert load_config(Command, file, [word]).data == expected


def test_a_section_may_be_text_in_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("shared: /images\nknn: {data: photos, val: '${shared}', caches: {a: '2024'}}\n")
    config = load_config(Command, file, ["val.limit=2", "data.limit=3"], section="knn")
    assert config.data == Images(path="photos", limit=3)
    assert config.caches == {"a": Images(path="2024")}
    assert load_config(Command, file, section="knn").val == Images(path="/images")


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("rate=1e-3", "rate", 1e-3),
        ("sizes=[1,2]", "sizes", [1, 2]),
        ("drop=true", "drop", True),
        ("drop=loss", "drop", "loss"),
        ("kind=none", "kind", "none"),
        ("data.limit=3", "data", Images(path="/default", limit=3)),
    ],
)
def test_other_values_are_yaml(word: str, key: str, value: Any) -> None:
    assert getattr(load_config(Command, None, [word]), key) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=a", "data.path=b"], r"data.path=... is given more than once"),
        (["output="], r"output= is given without a value: is a variable of the shell empty\? Write output=VALUE$"),
        (["data="], r"data.path= is given without a value"),
        (["sizes=[1,2"], r"^sizes=\[1,2: neither a number .* is a bracket missing\?$"),
        (["output=${a"], r"'\${', which begins an interpolation"),
        (["data.path=???"], r"data.path=\?\?\?: write ./\?\?\?"),
        (["=x"], r"'=x' is no override: write key=value"),
    ],
)
def test_words_that_cant_be_read(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Command, None, words)
