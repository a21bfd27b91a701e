import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import ConfigError
from pipeline.models import OBJECTIVES, Student
from pipeline.models.mae import pixel_loss
from pipeline.models.masking import complement, gather_tokens, visible_map
from pipeline.models.patches import patchify
from pipeline.models.phi_s import mean_and_covariance
from tests.micro import assert_overfits

Build = Callable[..., Student]
Draw = Callable[..., Any]


def predictions(student: Student, images: Tensor, ids_keep: Tensor) -> list[Tensor]:
    """All that the encoder gives for visible cells: the latent, the tapped blocks and the mimic heads' predictions."""
    encoded = student.encoder(images, ids_keep)
    outputs = [encoded.latent, *encoded.hidden]
    return outputs + [prediction for mimic in student.mimic.values() for prediction in mimic.predict(encoded.hidden)]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("fusion", ["fused", "each", "last"])
def test_no_masked_pixel_leaks_and_every_visible_one_counts(
    micro: Build, batch: Draw, kind: str, train: bool, sparse: bool, fusion: str
) -> None:
    student = micro(kind, sparse=sparse, fusion=fusion).train(train)
    images, ids_keep, _ = batch(student)
    visible = visible_map(ids_keep, student.grid, student.encoder.patch_size)  # [B, 1, H, W]
    before = predictions(student, images, ids_keep)

    other = torch.where(visible == 1, images, torch.randn_like(images) * 50)
    for was, now in zip(before, predictions(student, other, ids_keep), strict=True):
        assert torch.equal(was, now)  # exactly: not a bit of a masked pixel gets through

    for sample, row, column in visible[:, 0].nonzero()[::37].tolist():
        changed = images.clone()
        changed[sample, :, row, column] += 1
        for was, now in zip(before, predictions(student, changed, ids_keep), strict=True):
            assert not torch.equal(was[sample], now[sample])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_outputs_of_each_objective(micro: Build, batch: Draw, kind: str, objective: str) -> None:
    student = micro(kind, objective=objective)
    result = student(*batch(student))
    goal = OBJECTIVES[objective]
    expected = (
        {"loss"} | ({"pixel_loss", "pred"} if goal.pixels else set()) | ({"mimic_loss"} if goal.mimics else set())
    )
    assert result.keys() == expected
    if goal.pixels:
        assert result["pred"].shape == (3, 11, 8 * 8 * 3)
    parts = [result[name] for name in ("pixel_loss", "mimic_loss") if name in result]
    torch.testing.assert_close(result["loss"], torch.stack(parts).sum())
    assert student.target_rows == goal.target_rows


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("fusion", ["fused", "each", "last"])
@pytest.mark.parametrize("several", [True, "loss", False])
def test_every_parameter_takes_part_in_every_step(
    micro: Build, batch: Draw, kind: str, objective: str, fusion: str, several: bool | str
) -> None:
    """DDP stops at a parameter without a gradient, so nothing may be built that a step doesn't use."""
    options: dict[str, Any] = {"objective": objective, "fusion": fusion}
    if objective != "mae" and several:
        options |= {"teachers": {"clip": 8, "dino": 12}, "drop_teachers": several}
    student = micro(kind, **options)
    student(*batch(student))["loss"].backward()
    assert [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("objective", [name for name, goal in OBJECTIVES.items() if goal.masks])
def test_the_order_of_visible_cells_does_not_matter(micro: Build, batch: Draw, kind: str, objective: str) -> None:
    student = micro(kind, objective=objective).eval()
    images, ids_keep, targets = batch(student)
    order = torch.randperm(ids_keep.shape[1])
    if student.target_rows == "visible":
        moved = {teacher: target[:, order] for teacher, target in targets.items()}
    else:  # masked rows come in ascending order of cells, whatever the visible ones do
        moved = targets
    before, after = student(images, ids_keep, targets), student(images, ids_keep[:, order], moved)
    for name in before:
        torch.testing.assert_close(after[name], before[name])


def test_masked_targets_belong_to_the_masked_cells_ascending(micro: Build, batch: Draw, kind: str) -> None:
    student = micro(kind, objective="feature_decoder", target_scale=1.0).eval()
    images, ids_keep, _ = batch(student)
    decoded = student.decoder(student.encoder(images, ids_keep).latent, ids_keep)  # [B, L, d]
    everywhere = student.mimic["dino"].predict([decoded])[0].detach()  # [B, L, 20]
    masked = gather_tokens(everywhere, complement(ids_keep, 16))
    exact = student.mimic["dino"]
    exact.target_norm = "none"
    assert student(images, ids_keep, {"dino": masked})["loss"] < 1e-10


def test_pixels_are_regressed_at_masked_cells(micro: Build, batch: Draw, kind: str) -> None:
    student = micro(kind, objective="mae")
    images, ids_keep, _ = batch(student)
    result = student(images, ids_keep)
    masked = complement(ids_keep, 16)
    everywhere = student.decoder.predict_pixels(student.decoder(student.encoder(images, ids_keep).latent, ids_keep))
    torch.testing.assert_close(result["pred"], gather_tokens(everywhere, masked))
    expected = pixel_loss(gather_tokens(everywhere, masked), gather_tokens(patchify(images, 8), masked), True)
    torch.testing.assert_close(result["pixel_loss"], expected)


def test_convvit_mimics_before_the_stage_outputs_are_added(micro: Build, batch: Draw) -> None:
    student = micro("convvit")
    images, ids_keep, targets = batch(student)
    before = student(images, ids_keep, targets)
    torch.nn.init.normal_(student.encoder.stage1_output_decode.weight)
    torch.nn.init.normal_(student.encoder.stage2_output_decode.weight)
    after = student(images, ids_keep, targets)
    assert torch.equal(before["mimic_loss"], after["mimic_loss"])
    assert not torch.equal(before["pixel_loss"], after["pixel_loss"])


def test_weights_scale_the_losses(micro: Build, batch: Draw) -> None:
    student = micro("vit", mimic_weight=0.25, pixel_weight=3.0)
    result = student(*batch(student))
    torch.testing.assert_close(result["loss"], 0.25 * result["mimic_loss"] + 3 * result["pixel_loss"])


def test_teachers_share_the_mimic_loss_by_weight(micro: Build, batch: Draw) -> None:
    student = micro("vit", teachers={"clip": 8, "dino": 12}, teacher_weights={"clip": 3.0})
    result = student(*batch(student))
    expected = 0.75 * result["mimic_loss/clip"] + 0.25 * result["mimic_loss/dino"]
    torch.testing.assert_close(result["mimic_loss"], expected)


def test_dropping_teachers_keeps_one_for_each_sample_in_proportion(micro: Build, batch: Draw) -> None:
    student = micro("vit", teachers={"a": 4, "b": 4, "c": 4}, teacher_weights={"a": 2.0}, drop_teachers=True)
    shares = student._shares(torch.zeros(4000, 3))
    assert torch.equal(shares.sum(1), torch.ones(4000))
    assert set(shares.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(shares.mean(0), torch.tensor([0.5, 0.25, 0.25]), rtol=0, atol=0.03)
    torch.testing.assert_close(student.eval()._shares(torch.zeros(2, 3)), torch.tensor([[0.5, 0.25, 0.25]]))


def test_dropping_by_loss_keeps_the_worst_teacher_and_each_other_with_probability_a_half(micro: Build) -> None:
    student = micro("vit", teachers={"a": 4, "b": 4, "c": 4}, teacher_weights={"a": 2.0}, drop_teachers="loss")
    losses = torch.rand(6000, 3)
    shares, worst = student._shares(losses), losses.argmax(1)
    for teacher, share in enumerate((0.5, 0.25, 0.25)):
        for other, share_of_worst in enumerate((0.5, 0.25, 0.25)):
            rows = shares[worst == other, teacher]  # about 2000: a half is 0.5 ± 0.011 (one standard deviation)
            kept = share / ((1 + share_of_worst) / 2)
            torch.testing.assert_close(rows[rows > 0], torch.full_like(rows[rows > 0], kept))
            assert (rows > 0).float().mean() == pytest.approx(1 if teacher == other else 0.5, abs=0.05)
    # A sample's weights add up to 1 on average, whichever teacher is its worst.
    for other in range(3):
        assert shares[worst == other].sum(1).mean() == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(student.eval()._shares(losses), torch.tensor([[0.5, 0.25, 0.25]]))


@pytest.mark.parametrize(
    ("target_norm", "apart"), [("none", True), ("none", False), ("layernorm", False), ("phi_s", False)]
)
def test_no_teachers_scale_wins_once_standardised(micro: Build, batch: Draw, target_norm: str, apart: bool) -> None:
    """Norms of each teacher's gradient at the encoder: within 2× when standardised, far apart by the naive way."""
    scales = {"small": 0.05, "large": 100.0}
    spread = torch.logspace(-1, 1, 64)  # deviations of channels, a hundred times apart as those of real tokens
    student = micro(
        "vit",
        teachers={"small": 64, "large": 64},
        target_norm=target_norm,
        standardise_teachers=not apart,
        mimic_loss="mse",
    )
    images, ids_keep, targets = batch(student, size=16)
    targets = {teacher: scale * spread * targets[teacher] for teacher, scale in scales.items()}
    for teacher, target in targets.items():
        if target_norm == "phi_s":
            student.set_covariance(teacher, *mean_and_covariance(target))
        else:
            student.set_channel_stats(teacher, target.mean((0, 1)), target.std((0, 1)))
    norms = {}
    for teacher in scales:
        student.zero_grad()
        student(images, ids_keep, targets)[f"mimic_loss/{teacher}"].backward()
        grads = [p.grad for p in student.encoder.parameters() if p.grad is not None]
        norms[teacher] = torch.cat([grad.flatten() for grad in grads]).norm().item()
    ratio = norms["large"] / norms["small"]
    assert ratio > 20 if apart else 0.5 < ratio < 2


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_objective_overfits_eight_images(micro: Build, batch: Draw, kind: str, objective: str) -> None:
    depth: Any = 2 if kind == "vit" else (1, 1, 2)
    equal: dict[str, Any] = {"mimic_loss": "smooth_l1", "target_scale": 1.0}  # neither loss outweighs the other
    student = micro(kind, objective=objective, depth=depth, decoder_depth=1, **equal)
    _, ids_keep, targets = batch(student, size=8)
    assert_overfits(student, ids_keep, targets)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_checkpointing_changes_no_number(micro: Build, batch: Draw, kind: str, objective: str) -> None:
    plain = micro(kind, objective=objective)
    frugal = micro(kind, objective=objective, gradient_checkpointing=True)
    frugal.load_state_dict(plain.state_dict())
    drawn = batch(plain)
    for student in (plain, frugal):
        student(*drawn)["loss"].backward()
    for (name, one), other in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(other.grad, one.grad, msg=name)


def test_losses_are_fp32_and_finite_under_bf16(micro: Build, batch: Draw, kind: str) -> None:
    student = micro(kind, teachers={"clip": 8, "dino": 12})
    images, ids_keep, targets = batch(student)
    exact = student(images, ids_keep, targets)
    with torch.autocast("cpu", torch.bfloat16):
        result = student(images, ids_keep, {teacher: target.half() for teacher, target in targets.items()})
    result["loss"].backward()
    for name in exact.keys() - {"pred"}:
        assert result[name].dtype == torch.float32
        torch.testing.assert_close(result[name], exact[name], rtol=0.05, atol=0)
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("kind", "objective", "gradient_checkpointing"),
    [
        *(("vit", objective, False) for objective in OBJECTIVES),
        ("convvit", "mr_mae", False),
        ("convvit", "mr_mae", True),
    ],
)
def test_the_step_compiles_without_a_graph_break(
    micro: Build, batch: Draw, kind: str, objective: str, gradient_checkpointing: bool
) -> None:
    options: dict[str, Any] = {} if objective == "mae" else {"teachers": {"clip": 8, "dino": 12}}
    depth: Any = 1 if kind == "vit" else (1, 1, 1)
    student = micro(
        kind,
        objective=objective,
        gradient_checkpointing=gradient_checkpointing,
        depth=depth,
        decoder_depth=1,
        **options,
    )
    drawn = batch(student)
    torch.compiler.reset()
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")(*drawn)
    compiled["loss"].backward()
    for name, value in student(*drawn).items():
        torch.testing.assert_close(compiled[name], value)


def test_a_rotated_target_and_dropping_by_loss_compile_without_a_graph_break(micro: Build, batch: Draw) -> None:
    student = micro(
        "vit", teachers={"clip": 8, "dino": 12}, target_norm="phi_s", drop_teachers="loss", depth=1, decoder_depth=1
    )
    drawn = batch(student)
    for teacher, target in drawn.targets.items():
        student.set_covariance(teacher, *mean_and_covariance(target))
    torch.compiler.reset()
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    results = []
    for step in (compiled, student):
        torch.manual_seed(0)  # who is dropped
        with torch.autocast("cpu", torch.bfloat16):
            results.append(step(*drawn))
        results[-1]["loss"].backward()
    for name, value in results[1].items():
        torch.testing.assert_close(results[0][name], value)


@pytest.mark.parametrize("sparse", [True, False])
def test_ddp_steps_and_saves_flat_names(micro: Build, batch: Draw, kind: str, sparse: bool, tmp_path: Path) -> None:
    student = micro(kind, teachers={"clip": 8, "dino": 12}, drop_teachers=True, sparse=sparse)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(student)
        for _ in range(2):  # the second forward is where DDP finds that a parameter went unused in the first
            wrapped(*batch(student))["loss"].backward()
        assert list(wrapped.state_dict()) == [f"module.{name}" for name in student.state_dict()]
        wrapped.load_state_dict(wrapped.state_dict())
    finally:
        dist.destroy_process_group()


def test_a_copy_is_independent_and_keeps_its_names(micro: Build, kind: str) -> None:
    """What an exponential moving average of the weights needs."""
    student = micro(kind)
    twin = copy.deepcopy(student)
    with torch.no_grad():
        next(student.parameters()).add_(1)
    assert twin.state_dict().keys() == student.state_dict().keys()
    assert not torch.equal(next(twin.parameters()), next(student.parameters()))


def test_missing_targets_and_unknown_teachers_are_named(micro: Build, batch: Draw) -> None:
    student = micro("vit", teachers={"clip": 8, "dino": 12})
    images, ids_keep, targets = batch(student)
    with pytest.raises(ConfigError, match="no targets of dino"):
        student(images, ids_keep, {"clip": targets["clip"]})
    with pytest.raises(
        ConfigError, match=re.escape("targets of 'dino' are [3, 1, 12] where the student predicts [3, 5, 12]")
    ):
        student(images, ids_keep, {**targets, "dino": targets["dino"][:, :1]})
    with pytest.raises(ConfigError, match=re.escape("no teacher 'beit': it has clip, dino")):
        student.set_channel_stats("beit", torch.zeros(8), torch.ones(8))
