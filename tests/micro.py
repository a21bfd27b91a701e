"""Names and fixtures of micro models, which build in milliseconds."""

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

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


def without_key_biases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights without what the softmax ignores: a key's bias has rounding for a gradient, which Adam enlarges."""
    weights = {name: values.detach().clone() for name, values in state.items()}
    for name, values in weights.items():
        if name.endswith(("qkv.bias", "kv.bias")):
            values.view(3 if "qkv" in name else 2, -1)[-2] = 0
    return weights
