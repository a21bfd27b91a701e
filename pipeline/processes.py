"""Which processes there are, and what the environment may tell them.

torchrun or accelerate launch start the processes, accelerate knows them. What is trained follows from the config alone.
accelerate would also read its choices from variables that `accelerate launch` or a shell leaves in the environment;
here each of them is given, or refused.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DynamoBackend,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    TorchDynamoPlugin,
    gather,
    str_to_bool,
)
from torch import Tensor

from pipeline.errors import ConfigError

# What would replace the model, the optimiser or the step by another library's.
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "model parallelism",
}


def without_cuda() -> bool:
    """accelerate must be told that this is a CPU run: unasked, two processes on a CPU each think they are alone."""
    return not torch.cuda.is_available() or _is_set("ACCELERATE_USE_CPU")


def processes(patience: timedelta | None = None) -> PartialState:
    """This process's rank, their number and this one's device.

    Args:
        patience: how long processes wait for each other before all of them give up; torch's minutes by default.

    Raises:
        ConfigError: the environment asks for a way of training that there is none of.
    """
    _check_environment()
    waiting = {} if patience is None else {"timeout": patience}
    return PartialState(cpu=without_cuda(), **waiting)


def open_accelerator(mixed_precision: str, folder: Path) -> Accelerator:
    """accelerate for plain data parallelism: nothing compiled, sharded or accumulated but by this project's own keys.

    Args:
        mixed_precision: "no" or "bf16".
        folder: where trackers write.

    Raises:
        ConfigError: as `processes`.
    """
    _check_environment()
    return Accelerator(
        cpu=without_cuda(),
        mixed_precision=mixed_precision,
        # As a plugin: a number alone is overruled by ACCELERATE_GRADIENT_ACCUMULATION_STEPS.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # Else the statistics of batch norms would be the first process's alone, and sent before each forward.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        dynamo_plugin=TorchDynamoPlugin(backend=DynamoBackend.NO),
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder)),
        step_scheduler_with_optimizer=False,
    )


def _check_environment() -> None:
    for variable, what in _REFUSED.items():
        if _is_set(variable):
            raise ConfigError(
                f"{variable}={os.environ[variable]} in the environment asks for {what}, and there is data parallelism "
                "alone: unset it, or start the processes with torchrun or a plain `accelerate launch --multi_gpu`"
            )


def _is_set(variable: str) -> bool:
    try:
        return bool(str_to_bool(os.environ.get(variable) or "false"))
    except ValueError as error:
        raise ConfigError(f"{variable}={os.environ[variable]} in the environment is neither true nor false") from error


def processes_of_node() -> int:
    """How many of the processes run on this machine, as their launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def share_of(count: int) -> range:
    """This process's share of `count` samples: every P-th from its rank on, P being the number of processes."""
    state = processes()
    return range(state.process_index, count, state.num_processes)


def gather_rows(rows: Tensor, total: int, at_once: int = 65_536) -> Tensor:
    """All `total` rows [total, ...] in order, on the CPU of every process, of which each brought those of its share.

    Args:
        rows: those of `share_of(total)`, in this order; on whatever device.
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
