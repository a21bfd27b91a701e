"""What a run says: at its start, every minute and at its end, on standard error and in the run folder.

train.log       the lines of all starts, and the warnings, with their times
starts.jsonl    one JSON object a start: when, where, by which command, versions and commit
"""

import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.files import append_line
from pipeline.plugins import plugin_options
from pipeline.provenance import describe_process

log = logging.getLogger(__name__)

_PACKAGES = ("pipeline", "stages")
_FIRST_ESTIMATE, _EVERY = 10.0, 60.0  # seconds from the first step to the first line, and from line to line


class _LogFile(logging.FileHandler):
    """A full disk is told by the checkpoint that fails, in one line, not by a traceback of each log line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Leave the line out."""


class Journal:
    """Keeps what is said, and what the project warns of, in `folder`/train.log until it is closed.

    Raises:
        OSError: the file can't be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = _LogFile(folder / "train.log", encoding="utf-8")
        self._file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
        for name in _PACKAGES:
            logging.getLogger(name).addHandler(self._file)

    def say(self, text: str, *, on_screen: bool = True) -> None:
        """Into the file always; on the screen as far as the log shows what is told, not only warnings."""
        if on_screen and log.isEnabledFor(logging.INFO):
            log.info(text)
        else:
            self._file.emit(log.makeRecord(log.name, logging.INFO, __file__, 0, text, (), None))

    def record_start(self, facts: Mapping[str, Any]) -> None:
        """Append a line to starts.jsonl: where and how this process was started, and `facts` of the run."""
        place = {"host": socket.gethostname(), "command": shlex.join(sys.argv), "folder": os.getcwd()}
        append_line(self._folder / "starts.jsonl", json.dumps({**describe_process(), **place, **facts}))

    def close(self) -> None:
        for name in _PACKAGES:
            logging.getLogger(name).removeHandler(self._file)
        self._file.close()


class Pace:
    """How far a run of `total` steps is, how fast, and how long it will still take."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._first: tuple[int, float] | None = None  # the first step of this start, which may compile, and its end
        self._next_line = 0.0

    def line(self, done: int, latest: Mapping[str, Any]) -> str | None:
        """The line that is due after `done` steps, if one is; `latest` metrics are quoted."""
        moment = time.monotonic()
        if self._first is None:
            self._first, self._next_line = (done, moment), moment + _FIRST_ESTIMATE
        if moment < self._next_line or done == self._first[0]:
            return None
        self._next_line = moment + _EVERY
        left = (self._total - done) * (moment - self._first[1]) / (done - self._first[0])
        parts = [f"step {done} of {self._total} ({done / self._total:.0%})"]
        for name, form in (("loss", "{:.4f}"), ("lr", "{:.2g}"), ("images_per_s", "{:.3g}"), ("data_wait", "{:.0%}")):
            if name in latest:
                parts.append(f"{name} {form.format(latest[name])}")
        return ", ".join([*parts, f"{duration(left)} left"])


def duration(seconds: float) -> str:
    """Seconds as people say them: 40 s, 12 min, 3.5 h, 2.1 days."""
    for length, unit in ((86_400, "days"), (3600, "h")):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def command(name: str, *words: str) -> str:
    """A command line that a shell takes as it stands."""
    return shlex.join(["mrmae", *plugin_options(), name, *words])
