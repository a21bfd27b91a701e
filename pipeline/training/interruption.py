"""SIGTERM and SIGINT end a run after the step in hand, so that it can save first. A second ctrl-C ends it at once."""

import signal
from types import FrameType
from typing import Any

from pipeline.errors import PipelineError


class Interrupted(PipelineError):  # noqa: N818 - what happened, not a fault
    """The run was asked to stop and did so in good order."""

    exit_code = 130


class Interruption:
    """Context manager: while inside, `requested` becomes true on the first signal."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
