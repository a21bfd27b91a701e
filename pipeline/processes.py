"""Which processes there are: torchrun or accelerate launch start them, accelerate knows them."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

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


@contextmanager
def float32_products(precision: Literal["highest", "high"]) -> Iterator[None]:
    """Inside, matrix products of fp32 tensors are exact ("highest"), or may be taken in TF32 on CUDA ("high")."""
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(former)
