"""Where a result comes from: the command, the device and the versions of the process that made it."""

import platform
import shlex
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pipeline.processes import processes

_PROGRAMS = ("mrmae", "cli.py")  # whose words are keys of a config


def describe_process() -> dict[str, Any]:
    """When, by which command, on which device and versions this process runs; JSON-able.

    It names no host and no folder, so that results can be handed on. Of another program than `mrmae` it has the name
    alone: a notebook's command line is no help.
    """
    program, words = Path(sys.argv[0]).name, sys.argv[1:]
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join([program, *(words if program in _PROGRAMS else [])]),
        "device": describe_device(processes().device),
        "processes": processes().num_processes,
        "commit": _commit(Path(__file__).parents[1]),
        "versions": {
            "mrmae": _own_version(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "timm": version("timm"),
        },
    }


def describe_device(device: torch.device) -> str:
    """The name of the GPU, or the number of the CPU's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _own_version() -> str | None:
    """None where the program runs from a checkout that isn't installed."""
    try:
        return version("mrmae")
    except PackageNotFoundError:
        return None


def _commit(checkout: Path) -> str | None:
    """The commit that a checkout of git is at; None outside of one. Read from git's files: git may be missing."""
    try:
        git = checkout / ".git"
        if git.is_file():  # a worktree
            git = checkout / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        shared = git / "commondir"
        common = git / shared.read_text(encoding="utf-8").strip() if shared.exists() else git
        if (common / name).exists():
            return (common / name).read_text(encoding="utf-8").strip()
        packed = (common / "packed-refs").read_text(encoding="utf-8").splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)
    except OSError:
        return None
