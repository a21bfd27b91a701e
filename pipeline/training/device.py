"""What a run asks of its device."""

import logging
import random
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from pipeline.processes import float32_products, processes
from pipeline.training.flops import peak_tflops
from pipeline.training.run import Run, mixed_precision_of

log = logging.getLogger(__name__)


def float32_products_of(run: Run) -> AbstractContextManager[None]:
    """Where bf16 is allowed, what stays in fp32 may take TF32's products."""
    reduced = run.device.type == "cuda" and run.accelerator.mixed_precision == "bf16"
    return float32_products("high") if reduced else nullcontext()


def autocast_by(precision: str) -> torch.autocast:
    """What a run with this `precision` computes in, for a command that trains nothing."""
    return torch.autocast(processes().device.type, torch.bfloat16, enabled=mixed_precision_of(precision) == "bf16")


def generators_of(device: torch.device) -> list[torch.Generator]:
    """Those that a step draws from. `torch.manual_seed` asks for every accelerator of the machine, at each step."""
    if device.type != "cuda":
        return [torch.default_generator]
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[index]]


def seed_generators(generators: Iterable[torch.Generator], *numbers: int) -> None:
    """Let dropout, drop-path, mixup and erasing depend on these numbers alone: seed, step, micro-batch, rank."""
    words = np.random.SeedSequence(numbers).generate_state(3)
    for generator in generators:
        generator.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))  # timm's mixup draws from numpy's global state,
    random.seed(int(words[2]))  # its erasing from Python's


def peak_of(run: Run) -> float | None:
    """FLOP/s that the card could do, or None: on CPUs, and where neither the config nor the table knows it."""
    tflops = run.config.peak_tflops
    if tflops is None and run.device.type == "cuda":
        card = torch.cuda.get_device_name(run.device)
        tflops = peak_tflops(card)
        if tflops is None and run.is_main:
            log.info("no mfu in the rows: the rate of %s isn't known here; give peak_tflops=... to have it", card)
    return None if tflops is None else tflops * 1e12
