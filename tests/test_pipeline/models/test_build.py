import json
import re
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from pipeline.configs.models import ObjectiveName
from pipeline.errors import ConfigError
from pipeline.models import OBJECTIVES, Objective, Student, build_classifier, build_student
from pipeline.models.weights import build_from_spec

Build = Callable[..., Student]


def test_the_spec_rebuilds_the_student_even_through_json(micro: Build, kind: str) -> None:
    options = {"teachers": {"clip": 8, "dino.v1": 12}, "teacher_weights": {"clip": 2.0}, "image_size": (16, 32)}
    student = micro(kind, **options, fusion="each", fusion_blocks=(0, 2), target_norm="none", mimic_head="mlp")
    again = build_student(**json.loads(json.dumps(student.spec)))
    again.load_state_dict(student.state_dict())
    assert again.spec == student.spec
    assert again.grid == (2, 4)


def test_a_spec_from_before_targets_were_scaled_has_them_as_they_were(micro: Build) -> None:
    spec = micro("vit", target_scale=1.0).spec
    assert "target_scale" not in spec
    again = build_from_spec({"kind": "student", **spec})
    assert isinstance(again, Student)
    assert [mimic.scale for mimic in again.mimic.values()] == [1.0]
    former = {**micro("vit", target="codes").spec, "mimic_loss": "smooth_l1"}  # the default, which codes don't use
    assert isinstance(build_from_spec({"kind": "student", **former}), Student)


@pytest.mark.parametrize(
    ("depth", "blocks"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (11, [2, 5, 8, 10]), (12, [2, 5, 8, 11])]
)
def test_fusion_takes_four_evenly_spaced_blocks_and_the_last(micro: Build, depth: int, blocks: list[int]) -> None:
    assert list(micro("vit", depth=depth).encoder.taps) == blocks


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"objective": "mrmae"}, "objective='mrmae' is unknown: did you mean 'mr_mae'"),
        ({"target_norm": "batch"}, "use one of layernorm, channel, phi_s, none"),
        ({"mimic_loss": "l1"}, "use one of smooth_l1, mse, cosine"),
        ({"mimic_head": "conv"}, "use one of linear, mlp"),
        ({"target": "pixels"}, "use one of tokens, codes"),
        (
            {"target": "codes", "mimic_loss": "cosine"},
            "target=codes is learned by cross-entropy: leave target_norm and",
        ),
        (
            {"target": "codes", "target_norm": "phi_s"},
            "target=codes is learned by cross-entropy: leave target_norm and",
        ),
        ({"target": "codes", "summary_weight": 1.0}, "target=codes comes without class tokens: set summary_weight=0"),
        ({"drop_teachers": "worst"}, "use one of false, true, loss"),
        ({"fusion": "sum"}, "use one of fused, each, last"),
        ({"fusion": "last", "fusion_blocks": [1]}, "fusion=last takes no fusion_blocks"),
        ({"fusion_blocks": [0, 3]}, "fusion_blocks=[0, 3]: name different blocks from 0 to 2"),
        ({"fusion_blocks": [1, 1]}, "name different blocks"),
        ({"fusion_blocks": []}, "name different blocks"),
        ({"teachers": {}}, "objective=mr_mae mimics, but no teacher is given"),
        ({"teachers": {"dino": 0}}, "teacher 'dino': 0 is no positive width"),
        ({"teachers": {"a.b": 8, "a_b": 8}}, "differ only in '.' and '_'"),
        ({"teacher_weights": {"clip": 1.0}}, "teacher_weights='clip' is unknown"),
        ({"teacher_weights": {"dino": 0.0}}, "no positive width or weight"),
        ({"target_scale": 0.0}, "target_scale=0.0: give a number above 0"),
        ({"mimic_weight": -1.0}, "mimic_weight=-1.0: give 0 or more"),
        ({"pixel_weight": float("nan")}, "pixel_weight=nan: give 0 or more"),
    ],
)
def test_wrong_options_are_named(micro: Build, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        micro("vit", **wrong)


def test_mae_takes_no_teacher() -> None:
    with pytest.raises(ConfigError, match="objective=mae reads no teacher: leave clip out"):
        build_student("mrmae_vit_tiny_patch16", objective="mae", teachers={"clip": 8})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pool": "max"}, "use one of mean, cls"),
        ({"name": "mrmae_convvit_small_patch16", "pool": "cls"}, "has no CLS token: use pool=mean"),
        ({"num_classes": 0}, "num_classes=0: give 1 or more"),
        ({"drop_path": 1.0}, "drop_path=1.0: give a rate from 0 to below 1"),
    ],
)
def test_wrong_classifiers_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_classifier(**{"name": "mrmae_vit_tiny_patch16", "num_classes": 10, **wrong})


def test_a_config_may_name_every_objective() -> None:
    assert get_args(ObjectiveName) == tuple(OBJECTIVES)


def test_a_registered_loss_of_a_wrong_shape_or_with_options_is_named(
    micro: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PerToken(nn.Module):
        def __init__(self, dim: int, width: int) -> None:
            super().__init__()
            self.head = nn.Linear(dim, width)

        def forward(self, tokens: list[Tensor], targets: Tensor) -> Tensor:
            return (self.head(tokens[-1]) - targets).square().mean(-1)  # [B, N]

    monkeypatch.setitem(OBJECTIVES, "per_token", Objective(pixels=False, mimics="encoder", loss=PerToken))
    student = micro("vit", objective="per_token", teachers={"clip": 8})
    with pytest.raises(ConfigError, match=r"the loss of objective=per_token has the shape \[2, 4\] for a batch of 2"):
        student(
            torch.randn(2, 3, *student.encoder.image_size),
            torch.arange(4).expand(2, -1),
            {"clip": torch.randn(2, 4, 8)},
        )
    with pytest.raises(ConfigError, match="objective=per_token has a loss of its own: leave target_norm"):
        micro("vit", objective="per_token", teachers={"clip": 8}, mimic_loss="cosine")
    with pytest.raises(ConfigError, match="the targets of 'clip' take no statistics"):
        student.set_channel_stats("clip", torch.zeros(8), torch.ones(8))
    with pytest.raises(ConfigError, match="use one of"):
        Objective(pixels=False, mimics="tokens")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="say which tokens it compares"):
        Objective(pixels=True, mimics="", loss=PerToken)
