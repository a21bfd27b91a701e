"""Networks without memory: shapes on torch's meta device, built in the time that their Python takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _SkipDraws(TorchFunctionMode):
    """On the meta device initial values change nothing, and drawing them takes most of a build's time: skip it."""

    DRAWS = frozenset({"uniform_", "normal_", "erfinv_", "clamp_", "mul_", "add_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.DRAWS and args and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def meta_device() -> Iterator[None]:
    """Networks built here have shapes and no values."""
    with torch.device("meta"), _SkipDraws():
        yield
