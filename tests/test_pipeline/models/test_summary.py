"""The loss on a teacher's class token: its formula, its balance over teachers, and what it is made of."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, normalize

from pipeline.errors import ConfigError
from pipeline.models import Student, build_student
from pipeline.models.masking import visible_map
from pipeline.models.summary import SummaryHead, angular_dispersion
from tests.micro import NAMES

Build = Callable[..., Student]
Draw = Callable[..., Any]
SOURCES = [("vit", None), ("vit", "mean"), ("convvit", None)]


def class_tokens(student: Student, size: int = 3) -> dict[str, Tensor]:
    return {teacher: torch.randn(size, width) for teacher, width in student.spec["teachers"].items()}


def cone(width: float, count: int = 400, dim: int = 8) -> Tensor:
    """Summaries [count, dim] around one direction, of different lengths."""
    generator = torch.Generator().manual_seed(int(100 * width))
    directions = torch.eye(dim)[0] + width * torch.randn(count, dim, generator=generator)
    return directions * torch.rand(count, 1, generator=generator).add(0.5)


@pytest.mark.parametrize(("family", "source"), SOURCES)
def test_the_loss_is_the_cosine_distance_from_the_class_token_or_the_mean(
    micro: Build, batch: Draw, family: str, source: str | None
) -> None:
    student = micro(family, summary_weight=0.5, summary_source=source).eval()
    drawn, summaries = batch(student), class_tokens(student)
    result = student(*drawn, summaries=summaries)
    x, _ = student.encoder.forward_blocks(drawn.images, drawn.ids_keep)
    normed = layer_norm(x, (48,), eps=1e-6)
    vector = normed[:, 0] if (family, source) == ("vit", None) else normed[:, -drawn.ids_keep.shape[1] :].mean(1)
    predicted = normalize(student.summary["dino"].head(vector), dim=-1)
    expected = 1 - (predicted * normalize(summaries["dino"], dim=-1)).sum(-1).mean()
    torch.testing.assert_close(result["summary_loss"], expected)
    parts = result["mimic_loss"] + result["pixel_loss"] + 0.5 * result["summary_loss"]
    torch.testing.assert_close(result["loss"], parts)


def test_no_masked_pixel_reaches_it(micro: Build, batch: Draw, kind: str) -> None:
    student = micro(kind, summary_weight=1.0).eval()
    images, ids_keep, targets = batch(student)
    summaries = class_tokens(student)
    visible = visible_map(ids_keep, student.grid, student.encoder.patch_size)
    other = torch.where(visible == 1, images, torch.randn_like(images) * 50)
    before, after = (student(pixels, ids_keep, targets, summaries=summaries) for pixels in (images, other))
    assert torch.equal(before["summary_loss"], after["summary_loss"])


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("objective", ["mr_mae", "feature_encoder", "feature_decoder"])
@pytest.mark.parametrize(("family", "source"), SOURCES)
def test_every_parameter_takes_part_in_every_step(
    micro: Build, batch: Draw, family: str, source: str | None, objective: str, several: bool
) -> None:
    """DDP stops at a parameter without a gradient."""
    options: dict[str, Any] = {"teachers": {"clip": 8, "dino": 12}, "drop_teachers": "loss"} if several else {}
    student = micro(family, objective=objective, summary_weight=1.0, summary_source=source, **options)
    student(*batch(student), summaries=class_tokens(student))["loss"].backward()
    assert [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None] == []


def test_dispersion_is_the_mean_cosine_distance_from_the_mean_direction() -> None:
    summaries = cone(0.3)
    units = normalize(summaries.double(), dim=-1)
    mean_direction = normalize(units.mean(0), dim=-1)
    expected = (1 - units @ mean_direction).mean()
    torch.testing.assert_close(angular_dispersion(summaries.split(7)), expected)
    opposite = torch.cat([summaries, -summaries])
    assert angular_dispersion([opposite]).item() == pytest.approx(1)


def test_teachers_of_narrow_and_wide_cones_are_balanced(micro: Build, batch: Draw) -> None:
    """A student that always says the mean direction has the loss 1 for every teacher, and pulls of one size."""
    cones = {"narrow": cone(0.02), "wide": cone(0.5)}
    dispersions = {name: angular_dispersion([summaries]) for name, summaries in cones.items()}
    assert dispersions["wide"] > 50 * dispersions["narrow"]
    for name, summaries in cones.items():
        head = SummaryHead(4, 8, balanced=True)
        head.dispersion.copy_(dispersions[name])
        torch.nn.init.zeros_(head.head.weight)
        head.head.bias.data = normalize(summaries, dim=-1).mean(0)
        assert head(torch.randn(len(summaries), 4), summaries).mean().item() == pytest.approx(1, rel=1e-3)

    student = micro("vit", teachers={"narrow": 8, "wide": 8}, teacher_weights={"wide": 3.0}, summary_weight=1.0)
    drawn, summaries = batch(student), {name: cone(0.5, 3) for name in cones}
    before = student(*drawn, summaries=summaries)
    for name, dispersion in dispersions.items():
        student.set_dispersion(name, dispersion)
    after = student(*drawn, summaries=summaries)
    for name, dispersion in dispersions.items():
        torch.testing.assert_close(after[f"summary_loss/{name}"] * dispersion.float(), before[f"summary_loss/{name}"])
    shared = 0.25 * after["summary_loss/narrow"] + 0.75 * after["summary_loss/wide"]
    torch.testing.assert_close(after["summary_loss"], shared)


def test_the_dispersion_goes_with_the_checkpoint(micro: Build) -> None:
    student = micro("vit", teachers={"a": 8, "b.c": 8}, summary_weight=1.0)
    student.set_dispersion("b.c", torch.tensor(0.25))
    again = build_student(**json.loads(json.dumps(student.spec)))
    again.load_state_dict(student.state_dict())
    assert again.summary["b_c"].dispersion == 0.25


def test_summaries_that_do_not_differ_are_refused() -> None:
    same, broken = torch.ones(4, 8), torch.full((4, 8), torch.nan)
    for batches in ([], [same], [broken]):
        with pytest.raises(ConfigError, match="no class tokens that differ: check its weights"):
            angular_dispersion(batches)


def test_without_its_weight_nothing_of_it_is_built(micro: Build, kind: str) -> None:
    """A run of before such a loss goes on: neither its weights nor its description have anything new."""
    student = micro(kind, summary_weight=0.0)
    assert not [key for key in student.spec if "summary" in key]
    assert not [key for key in student.state_dict() if key.startswith("summary")]
    torch.manual_seed(1)
    plain = micro(kind)
    torch.manual_seed(1)
    weighted = micro(kind, summary_weight=1.0)
    state = weighted.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())


def test_what_does_not_fit_is_refused_in_a_line(micro: Build, batch: Draw) -> None:
    with pytest.raises(ConfigError, match="objective=mae reads no teacher: set summary_weight=0"):
        build_student(NAMES["vit"], objective="mae", summary_weight=1.0)
    with pytest.raises(ConfigError, match="has no CLS token: use summary_source=mean"):
        micro("convvit", summary_weight=1.0, summary_source="class")
    with pytest.raises(ConfigError, match="summary_weight=-1: give 0 or more"):
        micro("vit", summary_weight=-1)
    student = micro("vit", summary_weight=1.0)
    with pytest.raises(ConfigError, match="no summaries of dino: pass their class tokens"):
        student(*batch(student))
