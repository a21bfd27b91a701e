"""Which processes there are: torchrun or accelerate launch start them, accelerate knows them."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor


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


def gather_rows(rows: Tensor, total: int, at_once: int = 65_536) -> Tensor:
    """All `total` rows [total, ...] in order, on the CPU of every process, of which each brought those of its share.

    Args:
        rows: every P-th row from this process's rank on, P being the number of processes; on whatever device.
        at_once: rows of a process that are on the accelerator together, where the processes talk through it.
    """
    state = processes()
    count = -(-total // state.num_processes)  # of the longest share
    padded = torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])]) if len(rows) < count else rows
    parts = []
    for part in torch.split(padded, at_once):
        shares = gather(part.to(state.device)).cpu().unflatten(0, (state.num_processes, -1))
        parts.append(shares.transpose(0, 1).flatten(0, 1))
    return torch.cat(parts)[:total]


@contextmanager
def float32_products(precision: Literal["highest", "high"]) -> Iterator[None]:
    """Inside, matrix products of fp32 tensors are exact ("highest"), or may be taken in TF32 on CUDA ("high")."""
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(former)
