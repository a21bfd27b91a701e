"""The code of int4 is what its formulas say, for any width, and loses what theory says it loses."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache import Fidelity, Quantiser, match_header, read_header
from pipeline.cache.format.int4 import LEVELS, Int4, rotation
from pipeline.errors import CacheDamage, CacheError
from tests.test_pipeline.cache.samples import make_cache, make_header

WIDTHS = [2, 6, 192, 384, 768, 1024, 1152, 1280, 1408, 1664, 4096]
CPU = torch.device("cpu")


def real_looking(seed: int, n: int, L: int, D: int, spread: float = 60.0) -> torch.Tensor:
    """Correlated channels whose deviations span a factor of `spread`; some tokens are three times larger."""
    random = np.random.default_rng(seed)
    std = np.geomspace(1, spread, D)
    few = random.normal(size=(n, L, max(1, D // 8))) @ random.normal(size=(max(1, D // 8), D))
    values = (few + random.normal(size=(n, L, D))) * std + 3 * std
    values[:, :: max(2, L // 3)] *= 3
    return torch.from_numpy(values.astype(np.float32))


def test_each_level_is_the_mean_of_what_is_rounded_to_it() -> None:
    """What Lloyd and Max ask for, of a standard Gaussian, and 0.95% of its variance is lost."""

    def below(x: float) -> float:
        return 0.5 * (1 + math.erf(x / math.sqrt(2)))

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    edges = [-50.0, *((LEVELS[1:] + LEVELS[:-1]) / 2).tolist(), 50.0]
    kept = 0.0
    for low, high, level in zip(edges, edges[1:], LEVELS.tolist(), strict=False):
        share = below(high) - below(low)
        assert (density(low) - density(high)) / share == pytest.approx(level, abs=1e-6)
        kept += share * level**2
    assert 1 - kept == pytest.approx(0.0095, abs=2e-6)


@pytest.mark.parametrize("dim", WIDTHS)
def test_the_rotation_keeps_lengths_and_angles(dim: int) -> None:
    matrix, vectors = rotation(dim), np.random.default_rng(0).normal(size=(dim, 5))
    np.testing.assert_allclose(matrix.T @ (matrix @ vectors), vectors, atol=1e-11)
    assert np.abs(matrix).max() <= math.sqrt(2 / dim) + 1e-12
    sines = np.sin(np.arange(1, dim) ** 2)
    assert np.abs(sines).min() > 1e-6  # no library can differ about a sign
    if dim >= 192:
        assert 0.4 < (sines < 0).mean() < 0.6


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 4),
    L=st.integers(1, 7),
    half=st.integers(1, 20),
    gain=st.floats(1e-2, 1e2),
    spread=st.floats(1, 1e3),
)
def test_each_channel_is_rounded_to_the_nearest_level(
    seed: int, n: int, L: int, half: int, gain: float, spread: float
) -> None:
    """Of any tokens; so a rotated channel is off by half of a gap, or by what it lies beyond the last level."""
    D = 2 * half
    values = real_looking(seed, n, L, D, spread) * gain
    quantiser = Quantiser.calibrate("int4", values)
    stored, scale = quantiser.quantise(values)
    assert scale is not None
    assert (stored.dtype, stored.shape, scale.dtype) == (torch.uint8, (n, L, half), torch.float16)
    mean, std, turn = quantiser.mean, quantiser.std, rotation(D)
    step = scale.double().unsqueeze(-1).numpy()
    x = ((values.numpy() - mean) / std) @ turn.T / step
    y = ((quantiser.dequantise(stored, scale).numpy() - mean) / std) @ turn.T / step
    nearest = np.abs(x[..., None] - LEVELS).min(-1)
    slack = 1e-3 + 1e-5 * D * np.abs(mean / std).max() / step  # float32; a value on an edge may go either way
    assert (np.abs(np.abs(x - y) - nearest) <= slack).all()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32), dim=st.sampled_from([96, 192, 320]), spread=st.floats(1, 300))
def test_the_loss_is_theirs_in_every_channel(seed: int, dim: int, spread: float) -> None:
    """Correlated channels of any spread, and outlying tokens, lose what Gaussian ones lose: 0.0095 of each variance."""
    values = real_looking(seed, 48, 49, dim, spread)  # of fewer tokens both figures scatter beyond their bounds
    quantiser = Quantiser.calibrate("int4", values)
    meter = Fidelity()
    meter.update(values, quantiser.dequantise(*quantiser.quantise(values)))
    figures = meter.figures()
    assert figures.nmse_mean == pytest.approx(0.0095, rel=0.1)
    assert figures.nmse_worst < 0.016
    figures.check(max_nmse=2e-2, min_cosine=0.99)


def test_without_the_rotation_a_channel_is_lost() -> None:
    """Channels that are mostly zero, as after a ReLU, are far from Gaussian."""
    random = np.random.default_rng(0)
    sparse = random.normal(size=(16, 49, 192)) * (random.uniform(size=(16, 49, 192)) < 0.02)
    values = torch.from_numpy(sparse.astype(np.float32))
    quantiser = Quantiser.calibrate("int4", values)
    rotated, plain = Fidelity(), Fidelity()
    rotated.update(values, quantiser.dequantise(*quantiser.quantise(values)))
    code = Int4(192, CPU)
    code._rotation = torch.eye(192)
    standardised = (values - torch.from_numpy(quantiser.mean)) / torch.from_numpy(quantiser.std)
    plain.update(standardised, code.decode(*code.encode(standardised)))
    assert rotated.figures().nmse_worst < 0.015
    assert plain.figures().nmse_worst > 0.2


def test_two_channels_in_a_byte() -> None:
    code = Int4(2, CPU)
    code._rotation = torch.eye(2)
    token = torch.tensor([[-10.0, 10.0]])
    packed, scale = code.encode(token)
    assert packed.tolist() == [[0xB4]]  # -1 is nearest to level 4, 1 to level 11
    np.testing.assert_allclose(code.decode(packed, scale), [[10 * LEVELS[4], 10 * LEVELS[11]]], rtol=1e-3)


def test_autocast_changes_nothing() -> None:
    """The step that measures gradient norms runs its losses, and so the targets, under autocast."""
    values = real_looking(1, 2, 9, 16)
    quantiser = Quantiser.calibrate("int4", values)
    stored, scale = quantiser.quantise(values)
    expected = quantiser.dequantise(stored, scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(quantiser.quantise(values), (stored, scale), strict=True))
        assert torch.equal(quantiser.dequantise(stored, scale), expected)


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(CacheError, match="two channels in a byte, and the teacher has 5"):
        Quantiser.calibrate("int4", torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(CacheError, match="two channels in a byte, and the teacher has 5"):
        make_header(quantiser={"name": "int4"}, dim=5)


@pytest.mark.parametrize(("name", "version"), [("int8", 1), ("float16", 1), ("float32", 1), ("int4", 2)])
def test_the_version_is_the_lowest_that_can_be_read(tmp_path: Path, name: str, version: int) -> None:
    header = make_header(quantiser_name=name)
    assert header.version == make_header(quantiser={"name": name}).version == version
    with pytest.raises(ValueError, match=f"version {3 - version} doesn't fit what the cache holds"):
        make_header(quantiser_name=name, version=3 - version)
    assert read_header(make_cache(tmp_path / "cache", header)).version == version


def test_another_quantiser_is_named_and_not_its_version() -> None:
    with pytest.raises(CacheError, match=r"quantiser\.name is int8 there, int4 here"):
        match_header(Path("cache"), make_header(), make_header(quantiser={"name": "int4"}))


def test_headers_without_int4_are_those_of_before() -> None:
    """The fingerprint is in every record's checksum."""
    header = make_header(quantiser={"name": "int8", "mean": [0.0] * 8, "std": [1.0] * 8})
    assert header.fingerprint == "2f668d09f27ec265db83908929cda9ba38fbac099b27e2b09e18b79d4f2eb7ab"


def test_a_header_of_a_later_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="version"):
        make_header(version=3)
    path = make_cache(tmp_path / "cache", make_header(quantiser_name="int4"))
    content = (path / "cache.json").read_text()
    (path / "cache.json").write_text(content.replace('"version": 2', '"version": 1'))
    with pytest.raises(CacheDamage, match="version 1 doesn't fit what the cache holds"):
        read_header(path)
