"""Fully sharded data parallelism (torch's FSDP2): each process holds a share of weights, gradients and AdamW's state.

For students that outgrow a GPU. Checkpoints hold whole tensors under the names of every other run, so a run may go on
with another number of processes, or without sharding.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module, device: torch.device, bf16: bool) -> None:
    """Divide the parameters of `model`, which has `encoder.blocks`, among all processes, in place. Names stay.

    A block of the encoder is gathered to run, forward and backward, and freed after each. What else there is
    (embeddings, decoder, heads) is gathered from a step's forward to its backward. All start from the first process's
    weights, as under DDP.

    Args:
        bf16: on CUDA, gather blocks in bf16, since autocast would keep a bf16 copy of each weight for the backward.
            All else stays in fp32, so tokens between blocks are as without sharding. Gradients are reduced in fp32. On
            a CPU autocast leaves LayerNorm alone, so its weights stay in fp32.
    """
    for parameter in model.parameters():
        distributed.broadcast(parameter.detach(), src=0)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if bf16 and device.type == "cuda":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    encoder: Any = model.get_submodule("encoder")
    for block in encoder.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on its device. Of a sharded one, every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(state: Any, keep: bool) -> Any:
    """A state dict with whole tensors on the CPU in place of sharded ones; None in place of these without `keep`.

    Every process must call it.
    """
    if isinstance(state, DTensor):
        tensor = whole(state)
        return tensor.cpu() if keep else None
    if isinstance(state, Mapping):
        return {key: gathered(value, keep) for key, value in state.items()}
    return [gathered(value, keep) for value in state] if isinstance(state, list) else state


def scattered(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state dict of an optimiser, with shards in place of whole tensors where `optimizer` has sharded parameters.

    Nothing is sent: each process cuts its own share out of `state`.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def cut(value: Tensor, parameter: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
            return value  # AdamW's count of steps is a scalar
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)

    of_parameters = {
        index: {name: cut(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": of_parameters}


def blank_copy(model: nn.Module) -> nn.Module:
    """A copy without memory (on torch's meta device), for `fill`."""
    tensors = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        tensors[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return deepcopy(model, dict(tensors))


def fill(blank: nn.Module, model: nn.Module, device: torch.device) -> nn.Module:
    """Give `blank` the whole weights and buffers of the sharded `model`, which it was copied from.

    Its forward passes need no other process, so each process may run as many as it likes.
    """
    blank.to_empty(device=device)
    for target, source in ((blank.parameters(), model.parameters()), (blank.buffers(), model.buffers())):
        for empty, tensor in zip(target, source, strict=True):
            empty.detach().copy_(whole(tensor))
    return blank
