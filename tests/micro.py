"""Names and fixtures of micro models, which build in milliseconds."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pipeline.models import Student

NAMES = {"vit": "mrmae_vit_tiny_patch16", "convvit": "mrmae_convvit_base_patch16"}


@pytest.fixture(autouse=True)
def seeded(one_thread: None) -> None:
    """Each test draws the same numbers alone and in company."""
    torch.manual_seed(0)


@pytest.fixture(params=list(NAMES))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def assert_overfits(student: Student, *inputs: Any) -> None:
    """Each loss of eight smooth images, 32 pixels a side, falls below 0.4 of the first within 120 steps.

    Args:
        inputs: of `forward`, behind the images.
    """
    images = F.interpolate(torch.randn(8, 3, 6, 6), 32, mode="bicubic")  # smooth, as photographs are
    optimiser = torch.optim.AdamW(student.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for _ in range(120):
        result = student(images, *inputs)
        optimiser.zero_grad()
        result["loss"].backward()
        optimiser.step()
        losses.append({name: value.item() for name, value in result.items() if name != "pred"})
    for name, first in losses[0].items():
        assert losses[-1][name] < 0.4 * first, name
