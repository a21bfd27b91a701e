"""Attention on a CPU is counted, whether torch's own table has it or not."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils import flop_counter as torchs

from pipeline.flop_counting import flop_counter


@pytest.mark.parametrize("listed", [True, False])
def test_attention_is_counted(listed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two products forward, five backward: the scores are computed again."""
    for name in ("", "_backward"):
        operation = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{name}")
        if not listed:
            monkeypatch.delitem(torchs.flop_registry, operation, raising=False)
    inputs = [torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3)]
    product = 2 * 2 * 3 * 16 * 16 * 8
    with flop_counter() as counter:
        out = F.scaled_dot_product_attention(*inputs)
    assert counter.get_total_flops() == 2 * product
    with flop_counter() as counter:
        torch.autograd.grad(out.sum(), inputs)
    assert counter.get_total_flops() == 5 * product
