"""A CUDA device that holds no data and tells which operations would make the host wait for it.

Steps run on torch's fake tensors, which know device and shape alone, so no GPU is needed. What waits: a number or a
shape that is read from the device, and a copy between host and device that isn't asked to go on by itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
_READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim")


@contextmanager
def fake_cuda() -> Iterator[list[str]]:
    """Inside, tensors on `CUDA` can be made and computed with; yields the names of operations that waited."""
    waited: list[str] = []
    with FakeTensorMode(), _Watch(waited):
        yield waited


class _Watch(TorchDispatchMode):
    def __init__(self, waited: list[str]) -> None:
        super().__init__()
        self.waited = waited

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        on_device = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.device.type == "cuda"]
        if name in _READS and on_device:
            self.waited.append(name)
        if name in ("index", "index_put", "index_put_") and on_device:
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            self.waited += [f"{name} by a mask"] * bool(masks)
        if name == "_to_copy" and not kwargs.get("non_blocking"):
            to = kwargs.get("device")
            if to is not None and torch.device(to).type != args[0].device.type:
                self.waited.append(f"copy to {torch.device(to).type}")
        if name == "copy_" and args[0].device.type != args[1].device.type and not (args[2:] or [False])[0]:
            self.waited.append(f"copy to {args[0].device.type}")
        return func(*args, **kwargs)


def to_fake(model: nn.Module) -> nn.Module:
    """The model with parameters and buffers on `CUDA` in place of its own."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            moved = torch.empty(parameter.shape, dtype=parameter.dtype, device=CUDA)
            module.register_parameter(name, nn.Parameter(moved, parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA))
    model.to = lambda *_: model  # type: ignore[method-assign]  # it is there
    return model
