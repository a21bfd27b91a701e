"""Names and fixtures of micro models, which build in milliseconds."""

from collections.abc import Iterator

import pytest
import torch

NAMES = {"vit": "mrmae_vit_tiny_patch16", "convvit": "mrmae_convvit_base_patch16"}


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
