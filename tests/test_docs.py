"""What the documents say: links lead somewhere, and the commands they name exist and take the keys they are given.

`test_docs_run.py` runs the ones in code blocks.
"""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import click
import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

import cli
from pipeline.config import Config
from pipeline.keys import annotation_at
from stages.configs.finetune import EvaluateConfig

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
COMMANDS = (*cli.STAGES, *cli.BENCHMARKS)
CONFIGS: dict[str, type[Config]] = {
    command.name if command.package == "stages" else f"benchmark {command.name}": getattr(
        importlib.import_module(command.module), command.config
    )
    for command in COMMANDS
    if command.config
}


LAUNCHERS: dict[str, argparse.ArgumentParser] = {
    "accelerate": launch_command_parser(),
    "torchrun": get_args_parser(),
}
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
_CALL = re.compile(r"(?:^|\s)mrmae\s")
_BLANKS = ("...", "…")  # where the reader fills something in


def prose(document: Path) -> str:
    """The document without its code blocks."""
    return _FENCED.sub("", document.read_text())


def anchors(document: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", prose(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_links_resolve(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            file = document.parent / name if name else document
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


def test_anchors_are_those_of_github(tmp_path: Path) -> None:
    file = tmp_path / "a.md"
    file.write_text("# The cache, byte by byte\n```sh\n# no heading\n```\n## `--repair` & co.\n")
    assert anchors(file) == {"the-cache-byte-by-byte", "--repair--co"}


def code_blocks(document: Path, *languages: str) -> list[str]:
    """What stands in fenced blocks of these languages, in the document's order.

    Every block is matched with its own end, so that none is taken inside out.
    """
    return [block for language, block in _FENCED.findall(document.read_text()) if language in languages]


def calls_in(shell: str) -> list[str]:
    """The lines that call mrmae, continued ones as one."""
    return [line for line in shell.replace("\\\n", " ").splitlines() if _CALL.search(line)]


def shown_commands() -> list[tuple[str, str]]:
    """(document, command line) of every mrmae call in a code block."""
    return [
        (file.name, line) for file in DOCUMENTS for block in code_blocks(file, "", "sh") for line in calls_in(block)
    ]


def named_commands() -> list[tuple[str, str]]:
    """(document, command line) of every mrmae call in running text."""
    spans = [
        (file.name, span.replace("\n", " ")) for file in DOCUMENTS for span in re.findall(r"`([^`]+)`", prose(file))
    ]
    return [(name, span) for name, span in spans if _CALL.search(f"{span} ")]


def helped_commands() -> list[tuple[str, str]]:
    """(module, command line) of every mrmae call that a command's help shows."""
    helps = {command.module: importlib.import_module(command.module).__doc__ for command in COMMANDS}
    return [
        (module, line.partition(" (")[0])  # what stands in brackets is a remark
        for module, text in helps.items()
        for line in calls_in(text or "")
        if line.startswith("    ")
    ]


def test_no_call_hides_in_a_block_of_another_language() -> None:
    for document in DOCUMENTS:
        for language, block in _FENCED.findall(document.read_text()):
            assert language in ("", "sh", "python"), f"{document.name}: {language}"
            assert language == "sh" or not calls_in(block), f"{document.name}: mark this block as sh: {block}"


@pytest.mark.parametrize(("document", "line"), shown_commands() + named_commands() + helped_commands())
def test_commands_exist_and_know_their_keys(document: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    place = words.index("mrmae") + 1
    if words[0] in LAUNCHERS and "$" not in line:  # variables are filled in where the command is run
        launched(words[:place])
    words = [word for word in words[place:] if word not in _BLANKS]
    command: click.Command = cli.main
    name = []
    while isinstance(command, click.Group) and words:
        word = words.pop(0)
        if word.startswith("-"):
            assert word in options(command), f"{document}: no option {word}"
            continue
        found = command.get_command(click.Context(command), word)
        assert found is not None, f"{document}: no such command: {word}"
        command = found
        name.append(word)
    for word in words:
        assert not word.startswith("--") or word in options(command), f"{document}: {command.name} has no {word}"
        assert not word.startswith("configs/") or (ROOT / word).exists(), f"{document}: there is no {word}"
    keys = [word.partition("=")[0] for word in words if re.match(r"[a-z_.]+=", word)]
    evaluates = " ".join(name) == "finetune" and "--eval" in line.split()
    config = EvaluateConfig if evaluates else CONFIGS.get(" ".join(name))
    assert config is not None or not keys
    for key in keys:
        assert config is not None
        assert annotation_at(config, key.split(".")) is not None, f"{document}: {' '.join(name)} has no key {key}"


def options(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}


def launched(words: list[str]) -> list[str]:
    """What `accelerate launch ... --no_python mrmae WORDS` or `torchrun ...` gives to the command: WORDS.

    Their own parsers leave with an error at an option that they don't know.
    """
    program, *rest = words
    if program == "accelerate":
        assert rest.pop(0) == "launch"
    arguments = LAUNCHERS[program].parse_args(rest)
    # Not `-m cli`: Python would run a cli.py of the working folder.
    assert (arguments.no_python, bool(arguments.module), arguments.training_script) == (True, False, "mrmae")
    return list(arguments.training_script_args)
