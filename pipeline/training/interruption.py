"""SIGTERM, SIGHUP and SIGINT end a run after the step in hand, so that it can save first.

A second ctrl-C ends it at once.
"""

import os
import signal
from types import FrameType
from typing import Any

import torch
from torch import distributed

from pipeline.errors import PipelineError


class Interrupted(PipelineError):  # noqa: N818 - what happened, not a fault
    """The run was asked to stop and did so in good order."""

    exit_code = 130


class Interruption:
    """Context manager, entered by all processes together: inside, they learn at the same step that one was signalled.

    They agree over a group of their own on the CPUs, and read the answer a step later: no step waits for a device.

    Args:
        answer: what the first signal prints on standard error at once; nothing if it is empty.
    """

    def __init__(self, answer: str = "") -> None:
        self._text = answer
        self.requested = False  # a signal reached this process
        self._previous: dict[int, Any] = {}
        self._group: Any = None
        self._asked: tuple[torch.Tensor, Any] | None = None  # any process's flag once the work beside it is done

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # under nohup
            self._previous[number] = signal.signal(number, self._on_signal)
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            self._group = distributed.new_group(backend="gloo")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if kind is None:
            self._answer()  # nobody leaves while others are still asking

    def agreed(self) -> bool:
        """Once a step: whether all are to stop. With several processes a signal is heard a step later."""
        if self._group is None:
            return self.requested
        stop = self._answer()
        if not stop:
            flag = torch.tensor(int(self.requested))
            work = distributed.all_reduce(flag, distributed.ReduceOp.MAX, self._group, async_op=True)
            self._asked = flag, work
        return stop

    def _answer(self) -> bool:
        """What was asked at the last step."""
        if self._asked is None:
            return False
        (flag, work), self._asked = self._asked, None
        work.wait()
        return bool(flag)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._text and not self.requested:
            os.write(2, f"\n{self._text}\n".encode())  # not print: it may be at work in the code that was interrupted
        self.requested = True
