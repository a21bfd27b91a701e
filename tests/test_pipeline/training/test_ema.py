"""The moving average of weights, on models that rename their state dict too."""

import pytest
import torch

from pipeline.configs.training import EmaConfig
from pipeline.models import build_classifier
from pipeline.training.ema import build_ema


def test_follows_the_formula_on_a_classifier() -> None:
    """ema ← d·ema + (1 - d)·w with d = min(decay, 1 - step'^(-2/3)), and a plain copy at the first step."""
    torch.manual_seed(0)
    model = build_classifier("mrmae_vit_tiny_patch16", 3, image_size=32, dim=16, depth=1, num_heads=2)
    ema = build_ema(model, EmaConfig(decay=0.5))
    assert ema is not None
    expected = model.head.weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update(model, step)
        decay = min(0.5, 1 - step ** (-2 / 3)) if step > 1 else 0.0
        expected = decay * expected + (1 - decay) * model.head.weight.detach()
        torch.testing.assert_close(ema.module.head.weight.detach(), expected)
    assert list(ema.module.state_dict()) == list(model.state_dict())


def test_without_warmup_the_decay_is_constant() -> None:
    model = torch.nn.Linear(2, 2)
    ema = build_ema(model, EmaConfig(decay=0.9, warmup=False))
    assert ema is not None
    assert [ema.get_decay(step) for step in (2, 3, 100)] == [0.9, 0.9, 0.9]


def test_none_is_none() -> None:
    assert build_ema(torch.nn.Linear(2, 2), EmaConfig()) is None


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_decay_lies_between(decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        EmaConfig(decay=decay)
