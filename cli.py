"""The `mrmae` command: loads a config, calls a stage, prints its result.

`STAGES` and `BENCHMARKS` list the commands. The help of a command is the docstring of its module. It is read without an
import, so that `mrmae --help` answers at once; heavy libraries are imported when a command runs. This is the only place
that prints errors and sets exit codes: 0 well, 1 a cache is damaged or unfinished, 2 it could not run, 130 it was
interrupted.
"""

import errno
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import click

from pipeline.command_line import (
    DEBUG,
    PLUGIN,
    QUIET,
    KeyCommand,
    NamingGroup,
    flag,
    is_set,
    plugins_of,
    printing_option,
    read_help,
)

_EPILOG = (
    "Every key of a config can be given as key=value, for instance: batch_size=256 data.path=/data/train. "
    "mrmae COMMAND --keys lists them."
)

# What gloo and NCCL say in the processes that wait for one that has ended.
_SIGNS_OF_ANOTHERS_END = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "communicator was aborted",
)

_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - named, not used
_SIGNS_OF_A_FULL_DISK = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))


def show_facts(facts: dict[str, Any], as_json: bool) -> None:
    """One line a fact, or JSON; only the first process of a job prints."""
    if as_json:
        show_json(facts, as_json)
    elif facts and _is_first_process():
        width = max(len(name) for name in facts)
        for name, value in facts.items():
            click.echo(f"{name:<{width}}  {_readable(value)}")


def show_json(figures: dict[str, Any], _as_json: bool) -> None:
    click.echo(json.dumps(figures, indent=1))


def show_text(text: str, _as_json: bool) -> None:
    if _is_first_process():
        click.echo(text)


def show_verification(report: Any, as_json: bool) -> None:
    """The report; exit code 1 where it found damage."""
    click.echo(json.dumps(report.to_json(), indent=1) if as_json else report.to_text())
    sys.exit(0 if report.sound else 1)


def _readable(value: Any) -> str:
    if isinstance(value, float):
        digits = 6 if 0.999 < abs(value) < 1 else 4  # a cosine of 0.99997 is not 1
        return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, Iterable) and not isinstance(value, str):
        return json.dumps(value)
    return str(value)


def _is_first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


_FILE = click.Path(path_type=Path)
_COUNT = click.IntRange(min=1)
_PATH = click.Argument(["path"])  # a text: a URL is no path
_PRINT_CONFIG = flag("--print-config", "print_config", "Print the config that would be used, as YAML; run nothing.")
_JSON = flag("--json", "as_json", "Print everything as JSON.")
_EVALUATE = flag("--eval", "evaluate", "Train nothing: measure init=RUN, or several by their mean.")
_EVAL_ONLY = flag("--eval", "eval_only", "Score the run's newest checkpoint, or checkpoint=PATH.")
_RUNS = click.Argument(["paths"], nargs=-1, required=True, metavar="RUN...")
_PAGE = click.Option(["--output"], type=_FILE, help="The page; by default report.html in the folder, if it is one.")
_EXTRACTION = (
    flag("--init-only", "init_only", "Calibrate and create the cache, extract nothing: before a job array."),
    click.Option(["--shard-range"], metavar="A:B", help="Only the shards A to B-1, for job arrays."),
)
_VERIFICATION = (
    click.Option(["--level"], type=click.Choice(["quick", "full", "deep"]), default="full", show_default=True),
    click.Option(["--data"], metavar="PATH", help="Where the images lie now, if not where they were extracted from."),
    click.Option(["--weights"], metavar="FILE", help="The teacher's weights, for --level deep and --repair."),
    click.Option(["--samples"], type=_COUNT, default=64, show_default=True, help="Records that deep computes again."),
    flag("--repair", "repair", "Extract damaged shards again, and those whose lost images decode by now."),
)
_COPY = (
    click.Argument(["source"], metavar="SRC"),
    click.Argument(["target"], metavar="DST"),
    click.Option(["--shards"], metavar="A:B", help="Only the shards A to B-1."),
    flag("--dry-run", "dry_run", "Say what would be copied, and copy nothing."),
    flag("--full", "full", "Read also what DST has already, byte by byte, and replace what is damaged."),
    click.Option(["--license"], help="Of the features, for the card: a name that the hub knows, such as cc-by-4.0."),
)


class Command(NamedTuple):
    """A command calls `run(config)` of the module that has its name, and shows what that returns.

    Attributes:
        config: class of the module. With an argument of its own the parameters are its keys; else --config and
            KEY=VALUE give its keys, and the parameters go to `run`. None: `run` takes nothing.
        params: options and arguments of the command's own.
        show: prints what `run` returned; takes the result, and whether --json was given.
        evaluation: class of the module for `evaluate(config)`, which --eval calls in place of `run`.
        receives: what else `run` takes: "file" is --config, which is required then, "say" prints a line.
    """

    name: str
    config: str | None
    params: tuple[click.Parameter, ...] = ()
    show: Callable[[Any, bool], None] = show_facts
    evaluation: str | None = None
    receives: tuple[str, ...] = ()
    package: str = "stages"

    @property
    def module(self) -> str:
        return f"{self.package}.{self.name.replace('-', '_')}"

    @property
    def has_keys(self) -> bool:
        """Whether it takes KEY=VALUE."""
        return self.config is not None and not any(isinstance(param, click.Argument) for param in self.params)

    def load_class(self, evaluate: bool = False) -> Any:
        """The config class; that of a command with keys without importing the command, which takes seconds."""
        module = import_module(self.module.replace(".", ".configs.") if self.has_keys else self.module)
        return getattr(module, (self.evaluation if evaluate else None) or self.config or "")


STAGES = (  # in the order of a project
    Command("extract-teacher-features", "ExtractConfig", _EXTRACTION),
    Command("verify-cache", "VerifyConfig", (_PATH, *_VERIFICATION, _JSON), show_verification),
    Command("pretrain", "PretrainConfig"),
    Command("finetune", "FinetuneConfig", (_EVALUATE,), evaluation="EvaluateConfig"),
    Command("detect", "DetectConfig", (_EVAL_ONLY,)),
    Command("segment", "SegmentConfig", (_EVAL_ONLY,)),
    Command("linear-probe", "LinearProbeConfig"),
    Command("knn", "KnnConfig"),
    Command("embed", "EmbedConfig"),
    Command("predict", "PredictConfig", show=show_text),
    Command("ablate", "AblateConfig", show=show_text, receives=("file", "say")),
    Command("bootstrap", "BootstrapConfig", show=show_text, receives=("file", "say")),
    Command("visualize", "VisualizeConfig"),
    Command("export", "ExportConfig"),
    Command("report", "ReportConfig", (_RUNS, _PAGE)),
    Command("codes", "CodesConfig"),
    Command("cache-copy", "CacheCopyConfig", (*_COPY, _JSON)),
    Command("cache-info", "CacheInfoConfig", (_PATH, _JSON)),
    Command("plan", "PlanConfig"),
    Command("teachers", None, show=show_text),
    Command("demo", "DemoConfig", show=show_text, receives=("say",)),
)
BENCHMARKS = tuple(
    Command(name, f"Benchmark{name.title()}Config", show=show_json, package="benchmarks")
    for name in ("cache", "decode", "extract", "gpu", "student", "detector", "pretrain")
)


def _build(command: Command) -> click.Command:
    """The click command of a table's row."""

    def call(as_json: bool = False, print_config: bool = False, **given: Any) -> None:
        _set_up_logging()
        _load_plugins(plugins_of(click.get_current_context()))
        if print_config:
            from pipeline.config import config_text

            click.echo(config_text(_load(command, given)), nl=False)
        else:
            command.show(_run(command, given), as_json)

    attributes: dict[str, Any] = {"callback": call, "help": read_help(command.module)}
    if not command.has_keys:
        return click.Command(command.name, params=[*command.params, PLUGIN, DEBUG, QUIET], **attributes)
    required = "file" in command.receives
    file = click.Option(["--config", "file"], type=_FILE, required=required, help="YAML file; see configs/.")
    return KeyCommand(command.name, command.load_class, (file, *command.params, _PRINT_CONFIG), **attributes)


def _load_plugins(names: tuple[str, ...]) -> None:
    if names:
        from pipeline.plugins import load_plugins

        load_plugins(names)


def _load(command: Command, given: dict[str, Any]) -> Any:
    """The config that a command is called with, checked before the command's module is imported."""
    from pipeline.config import load_config, validate

    if not command.has_keys:
        return validate(command.load_class(), given)
    evaluate = command.evaluation is not None and given["evaluate"]
    section = command.name if command.package == "stages" else "benchmark"  # of a chain's file
    return load_config(command.load_class(evaluate), given["file"], given["overrides"], section)


def _run(command: Command, given: dict[str, Any]) -> Any:
    """Import the command's module and call it with what the user gave."""
    if command.config is None:
        return import_module(command.module).run()
    config = _load(command, given)
    stage = import_module(command.module)
    if not command.has_keys:
        return stage.run(config)
    file, _ = given.pop("file"), given.pop("overrides")
    if command.evaluation is not None and given.pop("evaluate"):
        return stage.evaluate(config)
    given |= {name: value for name, value in {"file": file, "say": click.echo}.items() if name in command.receives}
    return stage.run(config, **given)


class _Group(NamingGroup):
    """Prints one line for what a user can mend; a traceback only with --debug."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except KeyboardInterrupt:
            _fail(ctx, "interrupted; what is committed or checkpointed stays, the same command goes on from there", 130)
        except BrokenPipeError:
            # The reader of our output left, as `| head` does: no fault of ours, and nothing left to say.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Exception as error:  # noqa: BLE001 - the one boundary between the program and its user
            _fail(ctx, *_explain(error))


def _explain(error: Exception) -> tuple[str, int]:
    """The line that tells a user what went wrong, and the exit code."""
    from pipeline.errors import PipelineError

    if isinstance(error, PipelineError):
        return str(error), error.exit_code
    lack = _what_is_lacking(error)
    if lack:
        return f"{lack}, then run again", 2
    if isinstance(error, OSError):
        return f"{error.filename or 'the system'}: {error.strerror or error}", 2
    if type(error).__name__ == "OutOfMemoryError":
        return "the accelerator's memory is full: raise accum_iter in training, lower batch_size in everything else", 2
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_ANOTHERS_END):
        return "another process of this job has ended: the line that it left says why", 2
    lines = str(error).strip().splitlines() or ["no message"]
    line = lines[-1] if any(text.startswith("Traceback ") for text in lines) else lines[0]  # handed over by a process
    return f"unexpected {type(error).__name__}: {line} (mrmae --debug ... shows where)", 2


def _what_is_lacking(error: Exception) -> str:
    """What the machine has too little of, and what to do; each library has errors of its own for it."""
    number, text = getattr(error, "errno", None), str(error)
    if number in (errno.ENOSPC, errno.EDQUOT) or any(sign in text for sign in _SIGNS_OF_A_FULL_DISK):
        if _SHARED_MEMORY in text:
            return f"{_SHARED_MEMORY} is full: free some of it, or give the container more (docker: --ipc=host)"
        return f"the disk is full ({getattr(error, 'filename', None) or 'while writing'}): free some space"
    if isinstance(error, MemoryError) or number == errno.ENOMEM or "can't allocate memory" in text:
        return "memory is full: lower data.workers or batch_size, or give the job more memory"
    if number in (errno.EMFILE, errno.ENFILE):
        return "too many files are open: raise `ulimit -n`"
    return "no more threads can be started: raise `ulimit -u`" if "can't start new thread" in text else ""


def _fail(ctx: click.Context, message: str, code: int) -> None:
    if is_set(ctx, DEBUG):
        click.echo(traceback.format_exc(), err=True)
    click.echo(f"error: {message}", err=True)
    ctx.exit(code)


def _set_up_logging() -> None:
    ctx = click.get_current_context()
    debug, quiet = is_set(ctx, DEBUG), is_set(ctx, QUIET)
    level = logging.DEBUG if debug else logging.INFO if _is_first_process() and not quiet else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for package in ("pipeline", "stages", "benchmarks"):
        logging.getLogger(package).setLevel(level)
    if not debug:
        warnings.simplefilter("ignore")


def _all_keys() -> str:
    from pipeline.keys_page import keys_page

    rows = {row.name: row for row in STAGES} | {f"benchmark {row.name}": row for row in BENCHMARKS}
    classes = {name: row.load_class() for name, row in rows.items() if row.has_keys}
    return keys_page(classes, {name: row.load_class(evaluate=True) for name, row in rows.items() if row.evaluation})


@click.group(
    cls=_Group,
    params=[
        PLUGIN,
        DEBUG,
        QUIET,
        printing_option("--keys", _all_keys, "Print the keys of all commands: docs/keys.md."),
    ],
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
)
@click.version_option(package_name="mrmae")
def main() -> None:
    """MR-MAE pre-training without paying for the teacher at every step.

    Stage 1 runs a CLIP or DINO teacher once over your images and keeps its features in a cache; stage 2 trains masked
    autoencoders from images and cache. `mrmae demo` shows all of it in minutes, offline.
    """


benchmark = NamingGroup(
    "benchmark",
    help="Measure this machine. Prints JSON; ratios are taken in pairs in one run. Reads, writes, costs: see each one.",
    params=[PLUGIN, DEBUG, QUIET],
    commands=[_build(command) for command in BENCHMARKS],
)
for _command in (*map(_build, STAGES), benchmark):
    main.add_command(_command)


if __name__ == "__main__":
    main()
