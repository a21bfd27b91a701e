"""What the teachers' tests share: views, weights that aren't trivial, and the library's own full attention map."""

from collections.abc import Callable
from typing import Any

import huggingface_hub.constants
import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network of timm and open_clip with three blocks, where more of the same would prove nothing more."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **{"depth": 3, **options}))
    configs = open_clip.factory._MODEL_CONFIGS.values()
    for vision in (config["vision_cfg"] for config in configs):
        if isinstance(vision.get("layers"), int):
            monkeypatch.setitem(vision, "layers", 3)


@pytest.fixture
def views() -> Callable[..., Tensor]:
    """uint8 [count,3,size,size] views."""

    def make(size: int, count: int = 2, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)

    return make


@pytest.fixture
def shake() -> Callable[[nn.Module], Any]:
    """Move every parameter, so that no norm is the identity, no bias zero, no attention row uniform."""

    def shaken(model: nn.Module) -> Any:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        return model.eval()

    return shaken


@pytest.fixture
def full_map() -> Callable[[Any, Tensor], Tensor]:
    """Run a timm ViT by its unfused path and catch the softmax map [B,H,N,N] of the last block on its way."""

    def run(model: Any, pixels: Tensor) -> Tensor:
        caught: list[Tensor] = []
        attn = model.blocks[-1].attn
        fused, attn.fused_attn = attn.fused_attn, False
        handle = attn.attn_drop.register_forward_pre_hook(lambda _module, args: caught.append(args[0]))
        with torch.no_grad():
            model.forward_features(pixels)
        handle.remove()
        attn.fused_attn = fused
        return caught[0]

    return run
