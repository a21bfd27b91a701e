import re

import pytest
import torch
from torch.nn import functional as F

from pipeline.configs.models import TargetNorm
from pipeline.errors import ConfigError
from pipeline.models.mimic import CodeMimic, Mimic
from pipeline.models.phi_s import mean_and_covariance


def tokens(sources: int = 1) -> list[torch.Tensor]:
    return [torch.randn(2, 5, 12) for _ in range(sources)]


@pytest.mark.parametrize("loss", ["smooth_l1", "mse", "cosine"])
def test_losses_are_their_formulas_for_each_sample(loss: str) -> None:
    mimic, student, target = Mimic("dino", dim=12, width=8, loss=loss), tokens(), torch.randn(2, 5, 8)
    difference = mimic.predict(student)[0] - F.layer_norm(target, (8,))
    prediction, normed = mimic.predict(student)[0], F.layer_norm(target, (8,))
    expected = {
        "mse": difference.square().mean((1, 2)),
        "smooth_l1": torch.where(difference.abs() < 1, difference.square() / 2, difference.abs() - 0.5).mean((1, 2)),
        "cosine": 1 - ((prediction * normed).sum(2) / prediction.norm(dim=2) / normed.norm(dim=2)).mean(1),
    }
    torch.testing.assert_close(mimic(student, target), expected[loss])


def test_the_loss_of_codes_is_the_cross_entropy_of_each_sample() -> None:
    mimic, student, ids = (
        CodeMimic("dino", dim=12, width=8, sources=2, fusion="each"),
        tokens(2),
        torch.randint(8, (2, 5)),
    )
    chosen = [logits.log_softmax(2).gather(2, ids.unsqueeze(2)).squeeze(2) for logits in mimic.predict(student)]
    torch.testing.assert_close(mimic(student, ids), -torch.stack(chosen).mean((0, 2)))
    with pytest.raises(ConfigError, match=re.escape("codes of 'dino' are [2, 4] where the student predicts [2, 5]")):
        mimic(student, ids[:, :4])


def test_layernormed_targets_forget_scale_and_offset() -> None:
    mimic, target = Mimic("dino", dim=12, width=8), torch.randn(2, 5, 8)
    torch.testing.assert_close(mimic.normalise(target), mimic.normalise(300 * target + 7), atol=1e-4, rtol=0)


@pytest.mark.parametrize("target_norm", ["layernorm", "none"])
def test_normalised_targets_are_multiplied_by_the_scale(target_norm: TargetNorm) -> None:
    plain, scaled = (Mimic("dino", dim=12, width=8, target_norm=target_norm, scale=scale) for scale in (1.0, 4.0))
    target = torch.randn(2, 5, 8)
    torch.testing.assert_close(scaled.normalise(target), 4 * plain.normalise(target))


def test_channel_targets_are_standardised_by_the_given_statistics() -> None:
    mimic, target = Mimic("dino", dim=12, width=8, target_norm="channel"), torch.randn(2, 5, 8)
    mean, std = torch.randn(8), torch.rand(8) + 0.5
    mimic.set_stats(mean, std)
    torch.testing.assert_close(mimic.normalise(target * std + mean), target)


def test_a_raw_target_stays_raw_unless_standardised_by_one_scale() -> None:
    raw, one_scale = (Mimic("dino", dim=12, width=8, target_norm="none", standardise=s) for s in (False, True))
    target, mean, std = torch.randn(2, 5, 8), torch.randn(8), torch.rand(8) + 0.5
    assert torch.equal(raw.normalise(target), target)
    one_scale.set_stats(mean, std)
    torch.testing.assert_close(one_scale.normalise(target), (target - mean) / std.square().mean().sqrt())


@pytest.mark.parametrize("target_norm", ["channel", "phi_s"])
def test_statistics_that_are_needed_and_absent_are_an_error(target_norm: TargetNorm) -> None:
    mimic = Mimic("dino", dim=12, width=8, target_norm=target_norm)
    with pytest.raises(ConfigError, match=re.escape("targets of 'dino' can't be standardised without")):
        mimic.normalise(torch.randn(2, 5, 8))
    mimic.load_state_dict(mimic.state_dict())  # of a model that never had any
    with pytest.raises(ConfigError, match=re.escape("targets of 'dino' can't be standardised without")):
        mimic.normalise(torch.randn(2, 5, 8))


def test_statistics_of_another_width_are_an_error() -> None:
    with pytest.raises(ConfigError, match="have 7 and 7 channels where its targets have 8"):
        Mimic("dino", dim=12, width=8).set_stats(torch.zeros(7), torch.ones(7))
    with pytest.raises(ConfigError, match=re.escape("covariance of 'dino' is [7, 7] where its targets have 8")):
        Mimic("dino", dim=12, width=8, target_norm="phi_s").set_covariance(torch.zeros(7), torch.eye(7))


def test_statistics_stay_out_of_the_checkpoint() -> None:
    assert set(Mimic("dino", dim=12, width=8).state_dict()) == {"heads.0.weight", "heads.0.bias"}


def test_a_rotation_goes_into_the_checkpoint_and_stays_exact_under_bf16() -> None:
    """The heads predict in the basis of this rotation: one that is computed again may be another."""
    mimic, target = Mimic("dino", dim=12, width=8, target_norm="phi_s"), torch.randn(20, 5, 8) + 3
    mimic.set_covariance(*mean_and_covariance(target))
    again = Mimic("dino", dim=12, width=8, target_norm="phi_s")
    again.load_state_dict(mimic.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(again.normalise(target), mimic.normalise(target))
        assert mimic.normalise(target).dtype == torch.float32
    assert torch.equal(again.normalise(target), (target - mimic.channel_mean) @ mimic.rotation.T)


@pytest.mark.parametrize("sources", [2, 4])
def test_fusion_favours_the_last_source_at_first_and_learns_the_others(sources: int) -> None:
    mimic = Mimic("dino", dim=12, width=8, sources=sources, fusion="fused")
    weights = mimic.fusion_logits.softmax(0)
    assert weights[-1].item() == pytest.approx(0.75)
    student = tokens(sources)
    mixed = sum(w * F.layer_norm(x, (12,)) for w, x in zip(weights, student, strict=True))
    torch.testing.assert_close(mimic.predict(student)[0], mimic.heads[0](mixed), atol=1e-4, rtol=0)
    mimic(student, torch.randn(2, 5, 8)).mean().backward()
    assert mimic.fusion_logits.grad is not None
    assert mimic.fusion_logits.grad.all()


def test_each_source_has_a_head_and_a_loss_of_its_own() -> None:
    mimic, student, target = Mimic("dino", dim=12, width=8, sources=3, fusion="each"), tokens(3), torch.randn(2, 5, 8)
    assert len(mimic.predict(student)) == len(mimic.heads) == 3
    losses = []
    for head, x in zip(mimic.heads, student, strict=True):
        alone = Mimic("dino", dim=12, width=8)
        alone.heads[0] = head
        losses.append(alone([x], target))
    torch.testing.assert_close(mimic(student, target), torch.stack(losses).mean(0))


def test_an_mlp_head_is_not_linear() -> None:
    mimic, x = Mimic("dino", dim=12, width=8, head="mlp"), torch.randn(3, 12)
    head = mimic.heads[0]
    assert not torch.allclose(head(2 * x) - head(x), head(x) - head(0 * x))
