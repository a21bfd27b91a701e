"""Which processes there are: torchrun or accelerate launch start them, accelerate knows them."""

from datetime import timedelta

import torch
from accelerate import PartialState


def without_cuda() -> bool:
    """accelerate must be told that this is a CPU run: unasked, two processes on a CPU each think they are alone."""
    return not torch.cuda.is_available()


def processes(patience: timedelta | None = None) -> PartialState:
    """This process's rank, their number and this one's device.

    Args:
        patience: how long processes wait for each other before all of them give up; torch's minutes by default.
    """
    waiting = {} if patience is None else {"timeout": patience}
    return PartialState(cpu=without_cuda(), **waiting)
