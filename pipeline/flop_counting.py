"""torch's counter of floating-point operations, which counts attention on a CPU in every version."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_ATEN = torch.ops.aten


def flop_counter() -> FlopCounterMode:
    """A context that counts. Until torch 2.11 at least its own table lacks attention as a CPU computes it."""

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        return sdpa_backward_flop_count(grad, query, key, value)

    formulas = {
        _ATEN._scaled_dot_product_flash_attention_for_cpu: forward,
        _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    lacking = {operation: formula for operation, formula in formulas.items() if operation not in flop_registry}
    return FlopCounterMode(display=False, custom_mapping=lacking)
