import math

import pytest
import torch
from torch import nn

from pipeline.training.optim import CosineSchedule, OptimConfig, build_adamw, parameter_groups, set_lr


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4), requires_grad=False)
        self.fc = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)


def test_schedule_warms_up_and_follows_half_a_cosine() -> None:
    schedule = CosineSchedule(peak=1.0, minimum=0.1, warmup_steps=10, total_steps=110)
    assert [schedule(step) for step in (0, 5, 10)] == [0.0, 0.5, 1.0]
    for step in (10, 35, 60, 109):
        expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 100))
        assert schedule(step) == pytest.approx(expected)
    assert schedule(110) == pytest.approx(0.1)


def test_rate_is_given_per_256_images() -> None:
    assert OptimConfig(blr=1.5e-4).peak_lr(4096) == pytest.approx(2.4e-3)
    assert OptimConfig(lr=1e-3).peak_lr(4096) == 1e-3


def test_norms_biases_tokens_and_positions_are_not_decayed() -> None:
    net = Net()
    names = dict(net.named_parameters())
    groups = parameter_groups(net, weight_decay=0.05)
    decayed = {name for name, p in names.items() for g in groups if g["weight_decay"] for q in g["params"] if p is q}
    trained = {name for name, p in names.items() for g in groups for q in g["params"] if p is q}
    assert decayed == {"fc.weight", "head.weight"}
    assert trained == set(names) - {"pos_embed"}


def test_layer_decay_scales_the_rate() -> None:
    net = Net()
    layers = {"cls_token": 0, "fc.weight": 1, "fc.bias": 1, "norm.weight": 2, "norm.bias": 2} | {
        "head.weight": 3, "head.bias": 3
    }  # fmt: skip
    optimizer = build_adamw(parameter_groups(net, 0.05, layers, layer_decay=0.5), OptimConfig())
    set_lr(optimizer, 1.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: rates[id(p)] for name, p in net.named_parameters() if p.requires_grad}
    assert named == {"cls_token": 0.125, "fc.weight": 0.25, "fc.bias": 0.25} | {
        "norm.weight": 0.5, "norm.bias": 0.5, "head.weight": 1.0, "head.bias": 1.0
    }  # fmt: skip
