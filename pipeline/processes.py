"""Which processes there are: torchrun or accelerate launch start them, accelerate knows them."""

import torch
from accelerate import PartialState


def without_cuda() -> bool:
    """accelerate must be told that this is a CPU run: unasked, two processes on a CPU each think they are alone."""
    return not torch.cuda.is_available()


def processes() -> PartialState:
    """This process's rank, their number and this one's device."""
    return PartialState(cpu=without_cuda())
