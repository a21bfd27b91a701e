import re

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.models.mimic import Mimic
from pipeline.models.phi_s import hadamard, mean_and_covariance, phi_s_rotation

WIDTHS = [1, 2, 4, 12, 20, 28, 36, 44, 64, 192, 320, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1408, 1536, 1664, 1792]


@pytest.mark.parametrize("size", WIDTHS)
def test_hadamard_matrices_are_of_ones_with_orthogonal_rows(size: int) -> None:
    matrix = hadamard(size)
    assert matrix is not None
    assert (matrix.abs() == 1).all()
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 6, 92])
def test_other_widths_are_refused_in_a_clear_line(size: int) -> None:
    assert hadamard(size) is None
    with pytest.raises(ConfigError, match=f"no Hadamard matrix of {size} channels: use target_norm=channel"):
        phi_s_rotation(torch.eye(size))


def drawn(width: int, count: int = 20_000) -> torch.Tensor:
    """Tokens whose channels depend on each other, and have variances far apart."""
    spread = torch.logspace(-1, 1, width) * torch.randn(width, width).div(width**0.5).add(torch.eye(width))
    return torch.randn(count, width) @ spread.T + 30 * torch.randn(width)


@pytest.mark.parametrize("width", [12, 64, 192])
def test_every_channel_gets_variance_one(width: int) -> None:
    torch.manual_seed(0)
    tokens = drawn(width)
    mimic = Mimic("dino", dim=8, width=width, target_norm="phi_s")
    mimic.set_covariance(*mean_and_covariance(tokens.split(3000)))
    target = mimic.normalise(tokens).double()
    assert tokens.var(0).max() > 10 * tokens.var(0).min()
    torch.testing.assert_close(target.mean(0), torch.zeros(width, dtype=torch.float64), rtol=0, atol=1e-3)
    torch.testing.assert_close(target.var(0), torch.ones(width, dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("width", [12, 64, 192])
def test_it_is_a_rotation_and_one_scale_and_can_be_inverted(width: int) -> None:
    torch.manual_seed(0)
    tokens = drawn(width, 5000)
    mean, covariance = mean_and_covariance([tokens])
    rotation, scale = phi_s_rotation(covariance), covariance.diagonal().mean().sqrt()
    torch.testing.assert_close(rotation @ rotation.T * scale**2, torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close((rotation @ covariance @ rotation.T).diagonal(), torch.ones(width, dtype=torch.float64))
    mimic = Mimic("dino", dim=8, width=width, target_norm="phi_s")
    mimic.set_covariance(mean, covariance)
    back = mimic.normalise(tokens) @ mimic.rotation * scale.float() ** 2 + mimic.channel_mean
    torch.testing.assert_close(back, tokens, rtol=0, atol=1e-5 * tokens.abs().max().item())


def test_mean_and_covariance_are_those_of_all_batches_together() -> None:
    tokens = torch.randn(7, 11, 5).half()
    mean, covariance = mean_and_covariance([tokens[:3], tokens[3], tokens[4:]])
    flat = tokens.flatten(0, 1).double()
    torch.testing.assert_close(mean, flat.mean(0))
    torch.testing.assert_close(covariance, flat.T.cov(correction=0))


def test_tokens_that_tell_nothing_are_refused() -> None:
    for tokens in ([], [torch.full((3, 4), torch.inf)]):
        with pytest.raises(ConfigError, match="gave no tokens to measure, or some that are not finite"):
            mean_and_covariance(tokens)
    with pytest.raises(ConfigError, match=re.escape("tokens are all the same")):
        phi_s_rotation(mean_and_covariance([torch.ones(5, 4)])[1])
