"""Micro students that build in milliseconds, and batches for them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pipeline.models import Student, build_student

NAMES = {"vit": "mrmae_vit_tiny_patch16", "convvit": "mrmae_convvit_base_patch16"}
ENCODER = {"image_size": 32, "patch_size": 8, "dim": 48, "depth": 3, "num_heads": 3}  # 4 × 4 cells
DECODER = {"decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 2}


class Batch(NamedTuple):
    images: Tensor
    ids_keep: Tensor
    targets: dict[str, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Micro models are slower on several threads; and each test draws the same numbers alone and in company."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=list(NAMES))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def encoder_sizes() -> dict[str, Any]:
    return dict(ENCODER)


@pytest.fixture
def micro() -> Callable[..., Student]:
    def build(kind: str, **options: Any) -> Student:
        if options.get("objective") != "mae":
            options.setdefault("teachers", {"dino": 20})
        return build_student(NAMES[kind], **{**ENCODER, **DECODER, **options})

    return build


@pytest.fixture
def batch() -> Callable[..., Batch]:
    def draw(student: Student, size: int = 3, keep: int = 5) -> Batch:
        h, w = student.grid
        rows = {"visible": keep, "masked": h * w - keep, "none": 0}[student.target_rows]
        return Batch(
            torch.randn(size, 3, *student.encoder.image_size),
            torch.rand(size, h * w).argsort(1)[:, :keep],
            {teacher: torch.randn(size, rows, width) for teacher, width in (student.spec["teachers"] or {}).items()},
        )

    return draw
