"""Which processes there are, what they may be told by the environment, and what a stage leaves behind: nothing.

torchrun or accelerate launch start the processes, accelerate knows them. What is trained follows from the config alone.
accelerate would also read its choices from variables that `accelerate launch` or a shell leaves in the environment;
here each of them is given, or refused. A stage owns what is opened while it runs.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal, ParamSpec, Protocol, TypeVar
from weakref import WeakSet

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DynamoBackend,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    TorchDynamoPlugin,
    gather,
    str_to_bool,
)
from torch import Tensor, distributed

from pipeline.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")


class Closable(Protocol):
    """What a stage can own; closing it twice does nothing."""

    def close(self) -> None: ...


C = TypeVar("C", bound=Closable)

_stages: list[WeakSet[Closable]] = []  # what the stages at work own, the innermost last

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


def stage(run: Callable[P, R]) -> Callable[P, R]:
    """Make `run` the owner of what is opened in it: on any exit its loaders are closed, its process group left.

    An error alone would not do that: its traceback keeps alive what the frames hold, as long as somebody looks at it,
    and the other processes would wait for this one in the collective that they are in.
    """

    @functools.wraps(run)
    def owner(*args: P.args, **kwargs: P.kwargs) -> R:
        grouped = distributed.is_available() and distributed.is_initialized()
        owned: WeakSet[Closable] = WeakSet()
        _stages.append(owned)
        try:
            result = run(*args, **kwargs)
        except BaseException:
            _leave(owned, grouped, failed=True)
            raise
        _leave(owned, grouped, failed=False)
        return result

    return owner


def closed_with_stage(resource: C) -> C:
    """Let the stage at work close it, if it is still open then."""
    if _stages:
        _stages[-1].add(resource)
    return resource


def _leave(owned: WeakSet[Closable], grouped: bool, failed: bool) -> None:
    _stages.pop()
    with ExitStack() as last:
        if not grouped:
            last.callback(_leave_group, failed)
        for resource in list(owned):
            last.callback(resource.close)


def _leave_group(failed: bool) -> None:
    """Leave the process group that the stage has joined, so that its other processes learn of it at once."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if failed and "nccl" in distributed.get_backend():
        distributed.distributed_c10d._abort_process_group()  # to destroy it would wait for the others
    else:
        distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)  # or the next stage would think that the group is there


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
