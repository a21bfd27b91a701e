"""Commands of one --config file, run one after the other in processes of their own; what is done is not done again.

    chain = Chain(file, say=print)
    chain.check(["pretrain", "knn"])
    with chain:
        done = chain.run("pretrain", ["output=runs/a/pretrained"], folder=Path("runs/a"), title="a")

A folder's done.json holds for each step what was asked (a digest of its section), its seconds over all attempts, and
the top-1 of a measure; its commands.log what the commands printed. Several threads may run steps of different folders
at once.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import xxhash
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.errors import ConfigError, PipelineError
from pipeline.files import write_text
from pipeline.plugins import plugin_options
from pipeline.training.interruption import Interrupted, Interruption

_STOPPING = "stopping as soon as the commands in hand have saved; ctrl-C again ends them at once"
_INTERRUPTED = 130  # exit code of a command that was stopped and has saved
# A setting of this machine, such as where its data lies. The digest has its name: a folder may go on elsewhere.
_ENVIRONMENT = re.compile(r"\$\{oc\.env:(\w+)[^{}]*\}")
_ATTEMPTS = "attempts"  # in done.json, beside the names of steps
_CLI = Path(__file__).parents[3] / "cli.py"  # by its path: `-m cli` would run a cli.py of the working folder


class Done(NamedTuple):
    """A step that ended well: its wall time, that of stopped and failed attempts too, and the top-1 of a measure."""

    seconds: float
    top1: float | None


class Chain:
    """The sections of a file, each of which a command of that name reads; a context manager, within which they run.

    Stopped within it (ctrl-C, SIGTERM), the commands in hand may save.

    Args:
        say: gets a line when a command starts.
    """

    def __init__(self, file: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self.file, self._say = file, say
        self._root = cast(DictConfig, OmegaConf.load(file))
        self._interruption = Interruption(_STOPPING)
        self.commands = 0  # that were started

    def __enter__(self) -> Self:
        self._interruption.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._interruption.__exit__(*exception)

    def check(self, steps: Iterable[str]) -> None:
        """Before hours of work: each step has a section, and all of it resolves.

        Raises:
            ConfigError: a section is missing or doesn't resolve.
        """
        for step in steps:
            self.section(step)

    def section(self, step: str) -> dict[str, Any]:
        """What a command's section says, resolved.

        Raises:
            ConfigError: it is missing or doesn't resolve.
        """
        if not isinstance(self._root.get(step), DictConfig):
            raise ConfigError(f"--config {self.file} has no section '{step}': add it")
        try:
            return cast(dict[str, Any], OmegaConf.to_container(self._root[step], resolve=True))
        except OmegaConfBaseException as error:
            raise ConfigError(f"--config {self.file}, section '{step}': {str(error).splitlines()[0]}") from error

    def run(
        self,
        step: str,
        keys: Sequence[str],
        folder: Path,
        title: str,
        output: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Done:
        """Run `mrmae STEP --config FILE KEYS`, unless it is done.

        Args:
            folder: of done.json and commands.log.
            title: what the step is for, in the line that announces it.
            output: folder where a measure leaves its top-1; None for a step that is no measure.
            env: variables of the command's environment that differ from this process's.

        Raises:
            ConfigError: the step was done with other keys.
            PipelineError: the command failed. Interrupted: it was stopped, and has saved.
        """
        record, digests = folder / "done.json", self._digests(step, keys)
        done = _read(record)
        if step in done and done[step]["what"] not in digests:
            raise ConfigError(
                f"{folder} holds {step} with other keys than now: choose another output, or remove that folder"
            )
        if step not in done:
            if self._interruption.requested:
                raise Interrupted(f"stopped before {step}; the same command goes on from there")
            self._say(f"{title}: {step}")
            self.commands += 1
            arguments = [step, "--config", str(self.file), *keys]
            attempts = done.pop(_ATTEMPTS, {})
            former = attempts.pop(step, {})
            began = time.perf_counter() - (former["seconds"] if former.get("what") == digests[0] else 0.0)
            try:
                _command(arguments, folder / "commands.log", self._interruption, env or {})
            except BaseException:
                attempts[step] = {"what": digests[0], "seconds": time.perf_counter() - began}
                with contextlib.suppress(OSError):  # a full disk may be what the command failed of, and has said
                    _write(record, done, attempts)
                raise
            seconds = time.perf_counter() - began
            top1 = None if output is None else _top1(step, output)
            done[step] = {"what": digests[0], "seconds": seconds, "top1": top1}
            _write(record, done, attempts)
        return Done(done[step]["seconds"], done[step].get("top1"))

    def _digests(self, step: str, keys: Sequence[str]) -> tuple[str, str]:
        """What a command is asked: it tells whether an edited file asks for something else.

        The second digest has the values of environment variables, as records had before folders could change machines.
        """
        text = self.file.read_text(encoding="utf-8")
        return self._digest(_ENVIRONMENT.sub(r"<\1>", text), step, keys), self._digest(text, step, keys)

    def _digest(self, text: str, step: str, keys: Sequence[str]) -> str:
        root = cast(DictConfig, OmegaConf.create(text))
        root[step] = OmegaConf.merge(root[step], OmegaConf.from_dotlist(list(keys)))
        return xxhash.xxh3_128_hexdigest(OmegaConf.to_yaml(root[step], resolve=True).encode())


def _read(record: Path) -> dict[str, Any]:
    """Step → what was noted of it; empty where nothing is done yet."""
    try:
        return dict(json.loads(record.read_text(encoding="utf-8"))) if record.exists() else {}
    except (ValueError, TypeError) as error:
        raise PipelineError(f"{record} is damaged ({error}): remove it, and what it stood for runs again") from error


def _write(record: Path, done: Mapping[str, Any], attempts: Mapping[str, Any]) -> None:
    """What is done; and step → what was asked, and the seconds of attempts that were stopped or failed."""
    write_text(record, json.dumps({**done, **({_ATTEMPTS: attempts} if attempts else {})}, indent=1) + "\n")


def _command(arguments: list[str], log: Path, interruption: Interruption, env: Mapping[str, str]) -> None:
    """Run one command in a process of its own. Its output goes to the log, after the command itself.

    Stopped, it waits until the command has saved: ctrl-C reaches both, a SIGTERM is passed on.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as stream:
        words = [*plugin_options(), *arguments]
        stream.write("$ mrmae " + " ".join(words) + "\n")
        stream.flush()
        command = [sys.executable, str(_CLI), *words]
        environment = os.environ | dict(env)
        child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)  # noqa: S603 - ours
        passed_on = False
        while child.poll() is None:
            time.sleep(0.1)
            if interruption.requested and not passed_on:
                child.terminate()
                passed_on = True
    if child.returncode == _INTERRUPTED or (child.returncode < 0 and interruption.requested):
        raise Interrupted(f"{arguments[0]} was stopped; the same command goes on from there")
    if child.returncode:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1]
        raise PipelineError(f"{arguments[0]} failed: {last} (all of it in {log})")


def _top1(measure: str, folder: Path) -> float:
    """Top-1 as the command left it: in metrics.json of k-NN and probe, in the last evaluation of a fine-tuning."""
    if measure != "finetune":
        records = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        return float(records[measure.replace("-", "_")]["top1"])
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evaluations = [row for row in map(json.loads, lines) if "top1" in row]
    if not evaluations:
        raise ConfigError(f"{folder} holds no evaluation: give finetune.val.path in the config")
    return float(evaluations[-1]["top1"])
