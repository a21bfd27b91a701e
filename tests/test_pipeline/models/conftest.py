"""Micro students that build in milliseconds, and batches for them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pipeline.models import Student, build_student
from tests.micro import NAMES, kind, seeded  # noqa: F401 - fixtures

ENCODER = {"image_size": 32, "patch_size": 8, "dim": 48, "depth": 3, "num_heads": 3}  # 4 × 4 cells
DECODER = {"decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 2}


class Batch(NamedTuple):
    images: Tensor
    ids_keep: Tensor
    targets: dict[str, Tensor]


@pytest.fixture
def encoder_sizes() -> dict[str, Any]:
    return dict(ENCODER)


@pytest.fixture
def micro() -> Callable[..., Student]:
    def build(family: str, **options: Any) -> Student:
        if options.get("objective") != "mae":
            options.setdefault("teachers", {"dino": 20})
        return build_student(NAMES[family], **{**ENCODER, **DECODER, **options})

    return build


@pytest.fixture
def batch() -> Callable[..., Batch]:
    def draw(student: Student, size: int = 3, keep: int = 5) -> Batch:
        h, w = student.grid
        order = torch.rand(size, h * w).argsort(1)
        ids_keep = order[:, :keep] if student.objective.masks else order.sort(1).values
        shown = ids_keep.shape[1]
        rows = {"visible": shown, "masked": h * w - shown, "none": 0}[student.target_rows]
        return Batch(
            torch.randn(size, 3, *student.encoder.image_size),
            ids_keep,
            {teacher: torch.randn(size, rows, width) for teacher, width in (student.spec["teachers"] or {}).items()},
        )

    return draw
