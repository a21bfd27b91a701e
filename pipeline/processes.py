"""Which processes there are: torchrun or accelerate launch start them, accelerate knows them.

What is trained follows from the config alone. accelerate would also read its choices from variables that
`accelerate launch` or a shell leaves in the environment; here each of them is given, or refused.
"""

import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DynamoBackend,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    TorchDynamoPlugin,
    str_to_bool,
)

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
