from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from pipeline.config import Config, Pair, PathField, load_config, save_config
from pipeline.errors import ConfigError


class Inner(Config):
    path: PathField
    limit: int | None = Field(None, gt=0)


class Outer(Config):
    data: Inner
    extra: Inner | None = None
    scale: Pair = (0.2, 1.0)
    focus: Literal["sampled", "random"] = "sampled"
    rate: float = Field(1e-3, gt=0)


def test_file_then_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGES", "/images")
    file = tmp_path / "config.yaml"
    file.write_text("data: {path: '${oc.env:IMAGES}/train', limit: 5}\nrate: 1e-4\n")
    config = load_config(Outer, file, ["data.limit=7", "scale=[0.5,1]"])
    assert config == Outer(data=Inner(path=Path("/images/train"), limit=7), scale=(0.5, 1.0), rate=1e-4)


def test_a_saved_config_loads_again(tmp_path: Path) -> None:
    config = Outer(data=Inner(path=Path("/a b"), limit=3), focus="random")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(Outer, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.pth=/x", "data.path=/y"], r"unknown key 'data.pth' \(did you mean 'data.path'\?\)"),
        (["data.path=/x", "colour=red"], r"unknown key 'colour' \(known here: data, extra, scale, focus, rate\)"),
        (["rate=1"], r"'data' is missing: give data.path=\.\.\."),
        (["data.path=/x", "data.limit=0"], r"data.limit=0: .*greater than 0"),
        (["data.path=/x", "data.limit=many"], r"data.limit='many': must be a whole number"),
        (["data.path=/x", "focus=top"], r"focus='top': .*'sampled' or 'random'"),
        (["data.path=/x", "scale=[0.1]"], r"scale.1"),
        (["data.path=/x", "rate=.nan"], r"rate=nan: .*finite"),
        (["data.path=${nowhere}"], r"nowhere"),
        (["data.path"], r"write key=value"),
        (["data.path=/t-0.tar", "data.path=/t-1.tar"], r"data.path=... is given more than once: .* quote a pattern"),
    ],
)
def test_errors_name_the_key(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Outer, None, overrides)


@pytest.mark.parametrize("content", [b"a: [", b"- 1\n- 2\n", b"\xff\xfe\x00", b"a: ${", b"a: " + 999 * b"["])
def test_files_that_are_no_config(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError):
        load_config(Outer, file)


def test_a_text_that_wants_quotes_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("rate: 1.0\ndata: {path: *.tar}\n")
    with pytest.raises(ConfigError, match=r"config.yaml, line 2 is not readable YAML \(.*\): quote texts that hold \*"):
        load_config(Outer, file)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(Outer, tmp_path / "absent.yaml")


class Deep(Config):
    inner: Inner = Inner(path=Path("/default"), limit=3)
    width: int = 8


class Recipe(Config):
    inner: Inner = Inner(path=Path("/default"), limit=3)
    deep: Deep = Deep(inner=Inner(path=Path("/deep")), width=16)


def test_a_section_given_in_part_keeps_the_rest_of_its_default(tmp_path: Path) -> None:
    assert load_config(Recipe, None, ["inner.path=/mine"]).inner == Inner(path=Path("/mine"), limit=3)
    file = tmp_path / "config.yaml"
    file.write_text("deep: {inner: {limit: 5}}\n")
    assert load_config(Recipe, file).deep == Deep(inner=Inner(path=Path("/deep"), limit=5), width=16)
    # The recipe's own section counts, not the one of its class: its limit is None.
    assert load_config(Recipe, None, ["deep.inner.path=/mine"]).deep == Deep(inner=Inner(path=Path("/mine")), width=16)
    assert Recipe(inner=Inner(path=Path("/whole"))).inner.limit is None  # a whole section, from Python, is itself


class Flat(Config):
    knn: Inner | None = None
    rate: float = 1.0


def test_a_key_that_is_called_like_a_command_is_no_section(tmp_path: Path) -> None:
    config = Flat(knn=Inner(path=Path("/x")), rate=2.0)
    for each in (config, Flat()):
        save_config(each, tmp_path / "config.yaml")
        assert load_config(Flat, tmp_path / "config.yaml", section="pretrain") == each
    (tmp_path / "chain.yaml").write_text("pretrain: {rate: 3.0}\nknn: {data: {path: /y}}\nexport: {}\n")
    assert load_config(Flat, tmp_path / "chain.yaml", section="pretrain") == Flat(rate=3.0)
    (tmp_path / "chain.yaml").write_text("finetune: {rate: 3.0}\nknn: {path: /y}\n")
    with pytest.raises(ConfigError, match=r"has no section 'pretrain' \(it has finetune\)"):
        load_config(Flat, tmp_path / "chain.yaml", section="pretrain")


def test_a_section_may_be_empty_but_not_a_list(tmp_path: Path) -> None:
    file = tmp_path / "chain.yaml"
    file.write_text("export:\nknn:\n")
    assert load_config(Outer, file, ["data.path=/x"], section="export").data.path == Path("/x")
    file.write_text("export: [1, 2]\n")
    with pytest.raises(ConfigError, match="expected keys and values in section 'export'"):
        load_config(Outer, file, ["data.path=/x"], section="export")
