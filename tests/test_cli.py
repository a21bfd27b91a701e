"""The command line as a user meets it: help, one-line errors, exit codes."""

import errno
import importlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors import SafetensorError

import cli
from pipeline.config import Config
from stages import ablate
from tests import forked
from tests.test_stages.conftest import extract_config

ROOT = Path(__file__).parents[1]
COMMANDS = [[name] for name in cli.main.commands] + [["benchmark", name] for name in cli.benchmark.commands]


def mrmae(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_says_what_a_command_reads_writes_and_costs(words: list[str]) -> None:
    text = mrmae(*words, "--help").output.lower()
    for word in ("read", "write", "cost"):
        assert word in text, f"{' '.join(words)} --help doesn't say what it {word}s"


@pytest.mark.parametrize("command", [*cli.STAGES, *cli.BENCHMARKS], ids=lambda command: command.module)
def test_a_command_is_its_module(command: cli.Command) -> None:
    """The table finds modules and classes by name, and helps by docstring, without importing them."""
    module = importlib.import_module(command.module)
    assert callable(module.run)
    for name in (command.config, command.evaluation):
        assert name is None or issubclass(getattr(module, name), Config)
    words = ["benchmark"] if command.package == "benchmarks" else []
    shown = " ".join(mrmae(*words, command.name, "--help").output.split())
    assert " ".join(str(module.__doc__).split()) in shown


def test_every_stage_is_a_command() -> None:
    modules = {file.stem for file in (ROOT / "stages").glob("*.py")} - {"__init__"}
    assert modules == {command.name.replace("-", "_") for command in cli.STAGES}


def test_a_stage_receives_what_its_row_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: ablate.AblateConfig, file: Path, say: Callable[[str], None]) -> str:
        say(f"reads {file.name}")
        return "table"

    monkeypatch.setattr(ablate, "run", run)
    assert mrmae("ablate", "--config", str(ROOT / "configs/ablation_imagenette_tiny.yaml")).output.splitlines() == [
        "reads ablation_imagenette_tiny.yaml", "table"
    ]  # fmt: skip


def test_commands_in_help_keep_their_lines() -> None:
    assert "\n      mrmae knn init=runs/convvit data.path=/data/imagenet/train val.path=" in mrmae("knn", "-h").output


def test_facts_are_rounded_but_never_to_perfection(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"cosine": 0.99996791, "top1": 0.87654, "views_per_s": 35.98123, "rate": 12345.6, "all": 1.0}
    cli.show_facts(facts, False)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == [
        "0.999968", "0.8765", "35.98", "12346", "1"
    ]  # fmt: skip


def test_the_first_process_alone_prints_facts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    cli.show_facts({"top1": 0.5}, False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "--config", "absent.yaml"], "no such file"),
        (["pretrain", "output=/tmp/x", "batchsize=3"], "did you mean 'batch_size'"),
        (["pretrain", "output=/tmp/x", "epochs=many"], "epochs='many'"),
        (["pretrain", "output=/tmp/x", "mask.mask_ratio=1.5"], "mask.mask_ratio=1.5: must be less than 1"),
        (["pretrain", "output=/tmp/x", "optim.betas=[0.9,1]"], "optim.betas.1=1: must be less than 1"),
        (["extract-teacher-features", "data.path=/absent", "teacher.spec=dino_vits16", "cache.path=/tmp/c"], "/absent"),
        (["pretrain", "output=/tmp/x", "lr=1e-3"], "unknown key 'lr' (did you mean 'optim.lr'?)"),
        (
            ["pretrain", "output=/tmp/x", "image_size=64"],
            "(did you mean 'views.image_size' or 'student.image_size' or ",
        ),
        (["pretrain", "--batch_size", "60"], "there is no option --batch_size: keys are given without dashes, as "),
        (["pretrain", "--batch_size", "60"], "as key=value: write batch_size=60"),
        (["pretrain", "output=x", "--batch-size=60"], "write batch_size=60"),
        (["pretrain", "--data.path", "*.tar"], "write data.path=*.tar"),
        (["pretrain", "--lr", "1e-3"], "there is no option --lr: keys are given without dashes, as key=value (did you"),
        (["pretrain", "--epochs", "--keys2"], "write epochs=VALUE"),
        (["pretrain", "--debg"], "there is no option --debg: did you mean '--debug'?"),
        (["benchmark", "student", "--batch_size", "60"], "write batch_size=60"),
        (["knn"], "'data' is missing: give data=..."),
        (["knn", "data=/absent", "val=/absent"], "/absent"),
        (["extract-teacher-features", "data=/absent", "teacher=dino_vits16", "cache=/tmp/c"], "/absent"),
        (["visualize", "init=/absent", "images=a.jpg"], "/absent"),
        (
            ["detect", "output=x", "data.val=photos"],
            "data.val='photos': is a section: give its keys, as in data.val.im",
        ),
        (["embed", "init=/absent", "images=a.jpg", "output=a.npz"], "/absent does not exist"),
        (["predict", "init=/absent", "data=/absent"], "/absent does not exist"),
        (["predict", "init=/absent"], "give either images=[FILE,...] or data.path=..."),
        (
            ["segment", "output=x", "data.val.images=a", "data.val.labels=b"],
            "'data.train' is missing: give data.train.i",
        ),
        (["finetune", "data=/absent", "output=x", "augment.rand_augment=m9"], "augment.rand_augment='m9' is no policy"),
        (["verify-cache", "/absent"], "no cache.json"),
        (["knn", "data.path=/absent", "val.path=/absent"], "/absent"),
        (["finetune", "data.path=/absent", "val.path=/absent", "output=/tmp/x"], "/absent"),
    ],
)
def test_errors_are_one_line_without_a_traceback(arguments: list[str], message: str) -> None:
    result = mrmae(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.startswith("error: ")
    assert len(result.output.strip().splitlines()) == 1


def test_a_command_that_there_is_not() -> None:
    result = mrmae("pretrian")
    assert result.exit_code == 2
    assert "there is no command 'pretrian': did you mean 'pretrain'?" in result.output
    assert "there is no command 'studnt': did you mean 'student'?" in mrmae("benchmark", "studnt").output


@pytest.mark.parametrize("option", ["-q", "--quiet", "--debug"])
@pytest.mark.parametrize("words", [["plan"], ["benchmark", "decode"]], ids=" ".join)
def test_debug_and_quiet_stand_in_any_place(option: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("stages.plan" if words == ["plan"] else "benchmarks.decode")
    levels = []
    logger = logging.getLogger("stages")
    monkeypatch.setattr(logger, "level", logger.level)
    monkeypatch.setattr(module, "run", lambda config: levels.append(logger.level) or {})
    keys = [] if words == ["plan"] else ["data=x"]
    for place in range(len(words) + 1):
        assert mrmae(*words[:place], option, *words[place:], *keys).exit_code == 0
    assert mrmae(*words, *keys, option).exit_code == 0
    assert set(levels) == {logging.DEBUG if option == "--debug" else logging.WARNING}
    levels.clear()
    assert mrmae(*words, *keys).exit_code == 0
    assert levels == [logging.INFO]


@pytest.mark.parametrize("words", [["--debug", "verify-cache", "/absent"], ["verify-cache", "/absent", "--debug"]])
def test_debug_shows_the_traceback(words: list[str]) -> None:
    result = mrmae(*words)
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.output
    assert "pipeline.errors.CacheError: " in result.output
    assert result.output.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a b\nmore"), "unexpected ValueError: a b (mrmae --debug ... shows where)"),
        (
            RuntimeError(
                "Caught ValueError in a process\nTraceback (most recent call last):\n  File x\nValueError: bad"
            ),
            "unexpected RuntimeError: ValueError: bad (mrmae --debug ... shows where)",
        ),
        (KeyError(), "unexpected KeyError: no message (mrmae --debug ... shows where)"),
        (
            MemoryError(),
            "memory is full: lower data.workers or batch_size, or give the job more memory, then run again",
        ),
    ],
)
def test_an_error_of_no_kind_is_its_own_line(error: Exception, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.plan.run", lambda config: (_ for _ in ()).throw(error))
    result = mrmae("plan")
    assert (result.exit_code, result.output) == (2, f"error: {line}\n")


def test_an_empty_folder(tmp_path: Path) -> None:
    result = mrmae("extract-teacher-features", f"data.path={tmp_path}", "teacher.spec=x", f"cache.path={tmp_path}/c")
    assert result.exit_code == 2
    assert "no images in it" in result.output


def test_verify_exit_codes(image_tree: Path, tmp_path: Path) -> None:
    from stages import extract_teacher_features

    cache = tmp_path / "cache"
    extract_teacher_features.run(extract_config(image_tree, cache))
    assert mrmae("verify-cache", str(cache)).exit_code == 0
    max((cache / "commits").iterdir()).unlink()
    result = mrmae("verify-cache", str(cache), "--json")
    assert result.exit_code == 1
    assert '"sound": false' in result.output


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/a"), r"the disk is full \(/data/a\)"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), r"the disk is full \(while writing\)"),
        (
            RuntimeError("shared memory segment /dev/shm/nccl-x: No space left on device"),
            "/dev/shm is full: .*--ipc=host",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
        (MemoryError(), "memory is full: lower data.workers"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "memory is full"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory is full"),
        (OSError(errno.EMFILE, "Too many open files", "/data/a"), "too many files are open: raise `ulimit -n`"),
        (RuntimeError("can't start new thread"), "no more threads can be started: raise `ulimit -u`"),
        (OSError(errno.EIO, "Input/output error", "/data/a"), "/data/a: Input/output error"),
    ],
)
def test_what_the_machine_lacks_has_a_line_of_its_own(error: Exception, line: str) -> None:
    message, code = cli._explain(error)
    assert re.match(line, message)
    assert "unexpected" not in message
    assert code == 2


def start(
    popen: type[subprocess.Popen[str]] | type[forked.Popen], tmp_path: Path, image_tree: Path, cache: Path
) -> subprocess.Popen[str] | forked.Popen:
    """A pre-training run that would go on for hours, in a process of its own."""
    command = [
        sys.executable, "-m", "cli", "pretrain", f"data.path={image_tree}", f"cache.path={cache}", "log_every=1",
        "student={name: mrmae_vit_tiny_patch16, image_size: 64, dim: 48, depth: 1, num_heads: 3, decoder_dim: 32,"
        " decoder_depth: 1, decoder_heads: 2}", "batch_size=8", "epochs=100000", f"output={tmp_path}/run",
        "tensorboard=false", "checkpoint_every=100000",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


@pytest.mark.parametrize(
    ("number", "popen"),
    [(signal.SIGINT, subprocess.Popen), (signal.SIGTERM, forked.Popen), (signal.SIGHUP, forked.Popen)],
)
def test_a_signal_saves_before_leaving(
    image_tree: Path, tmp_path: Path, number: signal.Signals, popen: type[subprocess.Popen[str]] | type[forked.Popen]
) -> None:
    from stages import extract_teacher_features

    extract_teacher_features.run(extract_config(image_tree, tmp_path / "cache"))
    process = start(popen, tmp_path, image_tree, tmp_path / "cache")
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    os.killpg(process.pid, number)  # as a terminal and a scheduler do: the workers hear it too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "with a checkpoint; run again to go on" in errors
    assert "Traceback" not in errors
    assert len(list((tmp_path / "run/checkpoints").glob("step-*"))) == 1
