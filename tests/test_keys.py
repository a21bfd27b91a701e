"""Keys can be seen: --keys, --print-config, docs/keys.md, completion; and a wrong one is named at once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from pydantic import Field

import cli
from pipeline.config import Config, load_config
from pipeline.keys import Key, keys_of

ROOT = Path(__file__).parents[1]
STAGES = [command for command in cli.STAGES if command.has_keys]
BENCHMARKS = [command for command in cli.BENCHMARKS if command.has_keys]


def mrmae(*words: str) -> str:
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 0, result.output
    return result.output


class Part(Config):
    """What a part is. And more."""

    size: int = Field(
        8,
        ge=1,
    )  # pixels
    # Above the field,
    # in two lines.
    scale: tuple[float, ...] | None = None


class Base(Config):
    seed: int = 0  # of everything
    part: Part = Part(size=4)


class Derived(Base):
    seed: int = 1
    named: dict[str, Part] = Field(default_factory=dict)  # several
    name: str  # type: ignore[assignment]  # who


def test_keys_are_read_from_the_class_and_its_comments() -> None:
    assert list(keys_of(Derived)) == [
        Key("seed", "whole number", "1", "of everything"),
        Key("part", "section", "", "What a part is. And more"),
        Key("part.size", "whole number, ≥ 1", "4", "pixels"),
        Key("part.scale", "list of number or null", "null", "Above the field, in two lines."),
        Key("named", "sections by name", "{}", "several"),
        Key("named.NAME.size", "whole number, ≥ 1", "8", "pixels"),
        Key("named.NAME.scale", "list of number or null", "null", "Above the field, in two lines."),
        Key("name", "text", "required", "who"),
    ]


@pytest.mark.parametrize("command", STAGES, ids=lambda command: command.name)
def test_every_key_has_a_meaning(command: cli.Command) -> None:
    """Write it as a comment beside the field."""
    assert not [key.name for key in keys_of(command.load_class()) if not key.meaning]


@pytest.mark.parametrize("command", [*STAGES, *BENCHMARKS], ids=lambda command: command.module)
def test_keys_prints_them(command: cli.Command) -> None:
    words = [command.name] if command.package == "stages" else ["benchmark", command.name]
    lines = mrmae(*words, "--keys").splitlines()
    assert [line.split()[0] for line in lines] == [key.name for key in keys_of(command.load_class())]


def test_a_line_of_keys() -> None:
    lines = mrmae("finetune", "--keys").splitlines()
    (line,) = (line for line in lines if line.startswith("optim.blr "))
    assert re.split("  +", line) == [
        "optim.blr", "number, ≥ 0", "0.0005", "base learning rate: lr = blr × batch_size / 256"
    ]  # fmt: skip


def test_the_page_is_up_to_date() -> None:
    """If not: `make keys`."""
    assert (ROOT / "docs/keys.md").read_text(encoding="utf-8") == mrmae("--keys")


@pytest.mark.parametrize(
    "words",
    [
        ["pretrain", "data=2024", "cache=1e3", "output=yes", "knn.data=a", "knn.val=photos #2", "optim.lr=1e-3"],
        ["extract-teacher-features", "data=*.tar", "teachers.a=dino_vits16", "teachers.b=clip_vitb16", "cache=null"],
        ["finetune", "--eval", "init=[a,2024]", "val=a: b"],
        ["visualize", "init=runs/x", "images=cat.jpg"],
        ["pretrain", "--config", str(ROOT / "configs/imagenet_tiny.yaml"), "batch_size=8"],
        ["plan"],
    ],
    ids=" ".join,
)
def test_a_printed_config_is_the_config(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGENET", "/data/imagenet")
    file = tmp_path / "config.yaml"
    file.write_text(mrmae(*words, "--print-config"), encoding="utf-8")
    options = [word for word in words[:2] if word in (words[0], "--eval")]
    assert mrmae(*options, "--config", str(file), "--print-config") == file.read_text(encoding="utf-8")
    command = next(command for command in STAGES if command.name == words[0])
    cls, section = command.load_class("--eval" in words), words[0]
    given = Path(words[words.index("--config") + 1]) if "--config" in words else None
    config = load_config(cls, given, [word for word in words if "=" in word], section)
    assert load_config(cls, file, section=section) == config


def completed(*words: str) -> list[str]:
    found = ShellComplete(cli.main, {}, "mrmae", "_MRMAE_COMPLETE").get_completions(list(words[:-1]), words[-1])
    return [item.value for item in found]


def test_a_shell_completes_keys() -> None:
    assert completed("pretrain", "optim.w") == ["optim.warmup_epochs=", "optim.weight_decay="]
    assert completed("pretrain", "batch_size=8", "mask.f") == ["mask.focus="]
    assert completed("pretrain", "mask.focus=s") == ["mask.focus=sampled"]
    assert completed("knn", "da") == ["data=", "data.path=", "data.limit=", "data.workers="]


BASH = """
eval "$(_MRMAE_COMPLETE=bash_source mrmae)"
complete -p mrmae
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_mrmae_completion mrmae
printf '%s|' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("pretr", "pretrain |"),
        ("pretrain optim.w", "optim.warmup_epochs=|optim.weight_decay=|"),
        ("pretrain mask.focus =", "sampled |top-k |random |"),
        ("pretrain batch_size = 8 mask.focus = s", "sampled |"),
        ("benchmark decode rou", "rounds=|"),
    ],
)
def test_bash_adds_no_blank_behind_a_key_and_completes_its_value(tmp_path: Path, line: str, answer: str) -> None:
    """As bash splits words: `=` is one of its own."""
    program = tmp_path / "mrmae"
    program.write_text(f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\nimport cli\ncli.main()\n")
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = ["bash", "-c", BASH, "bash", "mrmae", *line.split()]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    registered, _, completed = done.stdout.partition("\n")
    assert "-o nospace" in registered
    assert completed == answer


def test_a_config_is_checked_before_torch_is_imported() -> None:
    """So a typo is answered in a fraction of a second; and keys are shown and completed so."""
    code = """
import sys
from click.testing import CliRunner
from click.shell_completion import ShellComplete
import cli
for command in (*cli.STAGES, *cli.BENCHMARKS):
    if command.has_keys:
        name = [command.name] if command.package == "stages" else ["benchmark", command.name]
        for words in (["batchsize=3"], ["seed=many"], ["--batch_size", "3"], ["--keys"], ["--print-config"]):
            result = CliRunner().invoke(cli.main, [*name, *words])
            codes = {"--keys": [0], "--print-config": [0, 2]}  # 2: a key that has no default
            assert result.exit_code in codes.get(words[0], [2]), (name, words, result.output)
            assert not {"Traceback", "unexpected"} & set(result.output.split()), result.output
            assert not {"torch", "timm", "numpy"} & set(sys.modules), (name, words)
        ShellComplete(cli.main, {}, "mrmae", "_MRMAE_COMPLETE").get_completions(name, "da")
        assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
