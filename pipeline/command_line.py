"""What every command of the command line has: keys that can be listed and completed, --debug and --quiet.

Nothing heavy is imported before it is needed, so that `--help` answers at once.
"""

import ast
import inspect
import re
import tokenize
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class

LoadClass = Callable[[], Any]  # () → the config class of a command


def flag(name: str, variable: str, help: str) -> click.Option:
    return click.Option([name, variable], is_flag=True, help=help)


def _remember(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    """A command and the groups around it share `ctx.meta`, so the option may stand before or behind the command."""
    if value:
        ctx.meta[f"mrmae.{option.name}"] = True


def _shared(names: list[str], help: str) -> click.Option:
    return click.Option(names, is_flag=True, is_eager=True, expose_value=False, callback=_remember, help=help)


DEBUG = _shared(["--debug"], "Show tracebacks, and what the libraries warn about.")
QUIET = _shared(["-q", "--quiet"], "Print errors and the result alone.")


def _collect(ctx: click.Context, option: click.Parameter, names: tuple[str, ...]) -> None:
    """As `_remember`: those before the command are loaded first."""
    ctx.meta[f"mrmae.{option.name}"] = (*ctx.meta.get(f"mrmae.{option.name}", ()), *names)


PLUGIN = click.Option(
    ["--plugin"],
    metavar="FILE.py|MODULE",
    multiple=True,
    expose_value=False,
    callback=_collect,
    help="Run this code of yours first; it registers objectives, teachers and students (docs/python.md).",
)


def plugins_of(ctx: click.Context) -> tuple[str, ...]:
    """What --plugin names, in whatever place."""
    return tuple(ctx.meta.get(f"mrmae.{PLUGIN.name}", ()))


def is_set(ctx: click.Context, option: click.Option) -> bool:
    """Whether DEBUG or QUIET is given, in whatever place."""
    return f"mrmae.{option.name}" in ctx.meta


def printing_option(name: str, text: Callable[[], str], help: str) -> click.Option:
    """An option that prints a text and ends the program, whatever else is given."""

    def show(ctx: click.Context, _option: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            click.echo(text(), nl=False)
            ctx.exit()

    return click.Option([name], is_flag=True, is_eager=True, expose_value=False, callback=show, help=help)


def _keys_option(load_class: LoadClass) -> click.Option:
    def text() -> str:
        from pipeline.keys_page import keys_text

        return keys_text(load_class())

    return printing_option("--keys", text, "List the keys with type, default and meaning.")


def _keys_argument(load_class: LoadClass) -> click.Argument:
    """KEY=VALUE words; a shell completes the keys, and behind `=` the words that a key may have."""

    def complete(_ctx: click.Context, _argument: click.Parameter, begun: str) -> list[CompletionItem]:
        from pipeline.keys import completions

        return [CompletionItem(word, help=meaning) for word, meaning in completions(load_class(), begun)]

    return click.Argument(["overrides"], nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete)


class _BashCompletion(BashComplete):
    """click's, for words that hold `=`: no blank behind `key=`, and values are completed behind it.

    bash takes the text before `=`, the `=` and the text behind it as three words, and replaces the last one alone.
    """

    _before = ""  # `key=`, where bash replaces what stands behind it

    def source(self) -> str:
        return f"{super().source()}complete -o nosort -o nospace -F {self.func_name} {self.prog_name}\n"

    def get_completion_args(self) -> tuple[list[str], str]:
        args, begun = super().get_completion_args()
        if begun == "=":  # nothing stands behind it yet
            args, begun = [*args, begun], ""
        if len(args) > 1 and args[-1] == "=":
            self._before = f"{args[-2]}="
            args = args[:-2]
        return args, self._before + begun

    def format_completion(self, item: CompletionItem) -> str:
        blank = "" if item.value.endswith("=") else " "
        return f"{item.type},{item.value.removeprefix(self._before)}{blank}"


add_completion_class(_BashCompletion)


def read_help(module: str) -> str:
    """A module's docstring, read without an import; click must not fill its indented lines as a paragraph."""
    with tokenize.open(Path(__file__).parents[1] / f"{module.replace('.', '/')}.py") as file:
        docstring = next(token for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.STRING)
    return re.sub(r"\n\n(?= )", "\n\n\b\n", inspect.cleandoc(ast.literal_eval(docstring.string)))


class KeyCommand(click.Command):
    """A command that takes KEY=VALUE; who writes a key as an option is told how keys are given."""

    def __init__(self, name: str, load_class: LoadClass, params: Iterable[click.Parameter], **attributes: Any) -> None:
        words, keys = _keys_argument(load_class), _keys_option(load_class)
        super().__init__(name, params=[words, *params, keys, PLUGIN, DEBUG, QUIET], **attributes)
        self._load_class = load_class

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            from pipeline.config_errors import explain_option
            from pipeline.errors import ConfigError

            near = error.possibilities or ()
            raise ConfigError(explain_option(self._load_class(), error.option_name, words, near)) from error


class NamingGroup(click.Group):
    """Commands in the order of their table, not of the alphabet; an unknown one is answered by a near one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from pipeline.errors import suggest

        if args[0] not in self.commands and not args[0].startswith("-"):
            ctx.fail(f"there is no command '{args[0]}': {suggest(args[0], self.commands, 'see --help')}")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)
