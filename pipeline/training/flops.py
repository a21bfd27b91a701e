"""Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B): what a step multiplies, over what the card could.

Counted once, operation by operation, by torch's counter; norms, activations and the optimiser count nothing, nor does
what gradient checkpointing computes a second time.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule

from pipeline.flop_counting import flop_counter

# Dense bf16 TFLOP/s with fp32 accumulation, from the makers' data sheets, by what torch calls the card. The first
# pattern that fits counts. Where a data sheet gives the rate with sparsity alone, half of it stands here.
_PEAKS = (
    (r"MIG|Laptop|Max-Q|4090 D", None),  # a part of a card, or another one of the same name
    (r"\bGB200\b", 2500.0),
    (r"\bB200\b", 2250.0),
    (r"\bH(100|200|800) NVL\b", 835.0),
    (r"\bH100 PCIe\b", 756.0),
    (r"\b(H100|H200|H800|GH200)\b", 989.0),
    (r"\bH20\b", 148.0),
    (r"\bA(100|800)\b", 312.0),
    (r"\bL40S\b", 362.0),
    (r"\bL40\b", 181.0),
    (r"\bL4\b", 121.0),
    (r"\bA40\b", 149.7),
    (r"\bA30\b", 165.0),
    (r"\bA10\b", 125.0),
    (r"\bRTX 6000 Ada\b", 364.0),
    (r"\bRTX A6000\b", 154.8),
    (r"\bRTX 5090\b", 209.5),
    (r"\bRTX 4090\b", 165.2),
    (r"\bRTX 3090\b", 71.0),
    (r"\bMI300X\b", 1307.0),
)


def peak_tflops(card: str) -> float | None:
    """Dense bf16 TFLOP/s of a card by the name that torch gives it; None for one that the table doesn't know."""
    for pattern, tflops in _PEAKS:
        if re.search(pattern, card):
            return tflops
    return None


def count_flops(model: nn.Module, losses: Callable[[], Mapping[str, Tensor]]) -> int:
    """Floating-point operations of a forward and a backward; `losses` runs the model, its "loss" is differentiated.

    Nothing is computed: the counter sees tensors without data (FakeTensorMode). The model must have run on real ones
    before, so that what its parts keep for later is made of data. Where shapes depend on data (`model.dynamic_shapes`),
    and where the model is sharded, the forward runs for real, without gradients, and counts three times: a backward has
    two products for each of its own.
    """
    if getattr(model, "dynamic_shapes", False) or isinstance(model, FSDPModule):
        with torch.no_grad(), flop_counter() as counter:
            losses()
        return 3 * int(counter.get_total_flops())
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with _nothing_twice(model), FakeTensorMode(allow_non_fake_inputs=True), flop_counter() as counter:
        torch.autograd.grad(losses()["loss"], parameters, allow_unused=True)
    return int(counter.get_total_flops())


@contextmanager
def _nothing_twice(model: nn.Module) -> Iterator[None]:
    """Without gradient checkpointing."""
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]
