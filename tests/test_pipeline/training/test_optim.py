import math

import pytest
import torch
from torch import nn

from pipeline.configs.training import OptimConfig
from pipeline.models import build_classifier, layer_ids
from pipeline.training.optim import CosineSchedule, build_adamw, cosine_schedule, parameter_groups, set_lr


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


@pytest.mark.parametrize(
    ("epochs", "warmup_epochs", "expected"), [(400, None, 400), (100, None, 100), (100, 7.5, 75), (4, 40, 20)]
)
def test_the_warm_up_is_a_tenth_of_the_run_unless_said_and_never_more_than_half(
    epochs: int, warmup_epochs: float | None, expected: int
) -> None:
    schedule = cosine_schedule(OptimConfig(warmup_epochs=warmup_epochs), 256, 10, 10 * epochs)
    assert schedule.warmup_steps == expected
    assert schedule(expected) == schedule.peak == 1.5e-4


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


# 0.65^(13 - layer), as BEiT and MAE compute it for 12 blocks: layer 0 is what comes before them, 13 what comes after.
BEFORE, AFTER = 0.0036972058910189, 1.0
BLOCKS = (
    0.0056880090631060, 0.0087507831740092, 0.0134627433446295, 0.0207119128378916, 0.0318644812890640,
    0.0490222789062500, 0.0754188906250000, 0.1160290625000000, 0.1785062500000000, 0.2746250000000000,
    0.4225000000000000, 0.6500000000000000,
)  # fmt: skip
# Names in a block, and whether they are decayed: matrices are, biases and norms are not.
IN_A_BLOCK = {
    "norm1.weight": False, "norm1.bias": False, "attn.qkv.weight": True, "attn.qkv.bias": False,
    "attn.proj.weight": True, "attn.proj.bias": False, "norm2.weight": False, "norm2.bias": False,
    "mlp.fc1.weight": True, "mlp.fc1.bias": False, "mlp.fc2.weight": True, "mlp.fc2.bias": False,
}  # fmt: skip


def test_every_parameter_of_vit_b_has_the_published_scale_and_decay() -> None:
    with torch.device("meta"):
        model = build_classifier("mrmae_vit_base_patch16", 1000)
    groups = parameter_groups(model, 0.05, layer_ids(model)[0], layer_decay=0.65)
    found = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    names = {name.removeprefix("encoder."): found[id(p)] for name, p in model.named_parameters()}
    expected = {
        "cls_token": (BEFORE, 0.0), "pos_embed": (BEFORE, 0.0),
        "patch_embed.proj.weight": (BEFORE, 0.05), "patch_embed.proj.bias": (BEFORE, 0.0),
        "fc_norm.weight": (AFTER, 0.0), "fc_norm.bias": (AFTER, 0.0),
        "head.weight": (AFTER, 0.05), "head.bias": (AFTER, 0.0),
    } | {
        f"blocks.{i}.{name}": (scale, 0.05 if decayed else 0.0)
        for i, scale in enumerate(BLOCKS) for name, decayed in IN_A_BLOCK.items()
    }  # fmt: skip
    assert names.keys() == expected.keys()
    assert len(expected) == 8 + 12 * 12
    for name, (scale, decay) in expected.items():
        assert names[name] == (pytest.approx(scale, rel=1e-10), decay), name


def test_the_fine_tuning_schedule_of_vit_b_is_the_published_one() -> None:
    """MAE's by the fractional epoch: lr·e/5, then min + (lr - min)·½(1 + cos π(e - 5)/95); lr = blr·batch/256."""
    per_epoch = 1_281_167 // 1024
    config = OptimConfig(blr=5e-4, min_lr=1e-6, warmup_epochs=5, betas=(0.9, 0.999), layer_decay=0.65)
    schedule = cosine_schedule(config, 1024, per_epoch, 100 * per_epoch)
    for step in range(0, 100 * per_epoch, 997):
        epoch = step / per_epoch
        cosine = 1e-6 + (2e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * (epoch - 5) / 95))
        assert schedule(step) == pytest.approx(2e-3 * epoch / 5 if epoch < 5 else cosine, rel=1e-12)
