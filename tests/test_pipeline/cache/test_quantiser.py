"""Bounds that hold for any tokens, and a guard for each failure that was seen."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache import Fidelity, FidelityFigures, Quantiser
from pipeline.errors import CacheError


def tokens(seed: int, n: int = 8, L: int = 9, D: int = 16, spread: float = 60.0) -> torch.Tensor:
    """Channels whose deviations span a factor of `spread`, as a real teacher's do."""
    random = np.random.default_rng(seed)
    std = np.geomspace(1, spread, D)
    return torch.from_numpy((random.normal(size=(n, L, D)) * std + 3 * std).astype(np.float32))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 5),
    L=st.integers(1, 7),
    D=st.integers(1, 20),
    gain=st.floats(1e-3, 1e3),
    spread=st.floats(1, 1e3),
)
def test_int8_error_is_at_most_half_a_step(seed: int, n: int, L: int, D: int, gain: float, spread: float) -> None:
    values = tokens(seed, n, L, D, spread) * gain
    quantiser = Quantiser.calibrate("int8", values)
    stored, scale = quantiser.quantise(values)
    assert scale is not None
    assert stored.dtype == torch.int8
    assert scale.dtype == torch.float16
    restored = quantiser.dequantise(stored, scale)
    step = scale.float().unsqueeze(-1) * torch.from_numpy(quantiser.std)
    slack = 1e-5 * (values.abs() + torch.from_numpy(np.abs(quantiser.mean))) + 127 * 2.0**-11 * step  # float32, clamp
    assert ((restored - values).abs() <= step / 2 + slack).all()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), name=st.sampled_from(["float16", "float32"]))
def test_floats_keep_their_precision(seed: int, name: str) -> None:
    values = tokens(seed)
    quantiser = Quantiser.calibrate(name, values)
    stored, scale = quantiser.quantise(values)
    assert scale is None
    restored = quantiser.dequantise(stored, None)
    assert restored.dtype == torch.float32
    torch.testing.assert_close(restored, values, rtol=2.0**-11 if name == "float16" else 0, atol=1e-7)


@pytest.mark.parametrize("name", ["int8", "int4", "float16", "float32"])
def test_arrays_and_tensors_agree_and_json_is_exact(name: str) -> None:
    values = tokens(1)
    quantiser = Quantiser.from_json(Quantiser.calibrate(name, values).to_json())
    stored, scale = quantiser.quantise(values)
    again, _ = Quantiser.calibrate(name, values).quantise(values)
    assert torch.equal(stored, again)
    arrays = quantiser.dequantise(stored.numpy(), None if scale is None else scale.numpy())
    np.testing.assert_array_equal(arrays, quantiser.dequantise(stored, scale).numpy())


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_zero_and_tiny_tokens_survive(name: str) -> None:
    """Without a floor, a zero token divides by zero and a tiny one falls among float16's subnormals."""
    values = tokens(0)
    quantiser = Quantiser.calibrate(name, values)
    still = torch.from_numpy(quantiser.mean) + torch.tensor([[0.0], [1e-7]])
    stored, scale = quantiser.quantise(still)
    assert scale is not None
    assert (scale == 2.0**-14).all()
    torch.testing.assert_close(quantiser.dequantise(stored, scale), still, rtol=1e-3, atol=1e-3)


def test_a_channel_that_is_constant_in_calibration_may_move_later() -> None:
    values = tokens(0)
    values[..., 3] = 5.0
    quantiser = Quantiser.calibrate("int8", values)
    assert quantiser.std[3] == pytest.approx(0.01 * float(values.reshape(-1, 16).std(0, correction=0).median()))
    later = values.clone()
    later[..., 3] += torch.randn(later.shape[:-1], generator=torch.Generator().manual_seed(0))
    restored = quantiser.dequantise(*quantiser.quantise(later))
    assert (restored[..., 3] - later[..., 3]).abs().max() < 0.1


def test_all_constant_channels_have_a_deviation_of_one() -> None:
    assert (Quantiser.calibrate("int8", torch.ones(2, 3, 4)).std == 1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("name", ["int8", "int4", "float16"])
def test_tokens_that_are_not_finite_or_too_large_show(name: str, bad: float) -> None:
    """Extraction looks for them where the results arrive on the host."""
    values = tokens(0)
    quantiser = Quantiser.calibrate(name, values)
    values[1, 2, 3] = bad
    stored, scale = quantiser.quantise(values)
    finite = torch.isfinite(stored if scale is None else scale)
    assert not finite[1, 2].all()
    finite[1, 2] = True
    assert finite.all()


def test_calibration_on_tokens_that_are_not_finite_fails() -> None:
    with pytest.raises(CacheError, match="not finite"):
        Quantiser.calibrate("int8", torch.full((1, 2, 3), np.nan))


@pytest.mark.parametrize("name", ["int2", "bfloat16", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(CacheError, match="not one of int8, int4, float16, float32"):
        Quantiser(name)


@pytest.mark.parametrize("state", [{"mean": [1], "std": []}, {"mean": [1], "std": [0]}, {"mean": "x"}, {"std": [None]}])
def test_statistics_that_cannot_be_are_refused(state: dict[str, object]) -> None:
    with pytest.raises(CacheError, match="mean and std"):
        Quantiser.from_json({"name": "int8", **state})


def test_int8_without_statistics_does_nothing() -> None:
    assert not Quantiser("int8").calibrated
    with pytest.raises(CacheError, match="calibrate"):
        Quantiser("int8").quantise(tokens(0))


def test_fidelity_by_its_definition() -> None:
    values = tokens(3, n=20)
    restored = values + 0.01 * torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    meter = Fidelity()
    meter.update(values, restored)
    figures = meter.figures()
    x, y = values.reshape(-1, 16).double().numpy(), restored.reshape(-1, 16).double().numpy()
    nmse = ((y - x) ** 2).mean(0) / x.var(0)
    a, b = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert figures.tokens == 180
    assert figures.nmse_worst == pytest.approx(nmse.max(), rel=1e-5)
    assert figures.nmse_mean == pytest.approx(nmse.mean(), rel=1e-5)
    assert figures.cosine_mean == pytest.approx(cosine.mean(), abs=1e-7)
    assert figures.cosine_worst == pytest.approx(cosine.min(), abs=1e-7)


def test_fidelity_merges_as_if_seen_at_once() -> None:
    values = tokens(4, n=30)
    restored = values + 0.02 * torch.randn(values.shape, generator=torch.Generator().manual_seed(2))
    whole, parts = Fidelity(), Fidelity()
    whole.update(values, restored)
    for some, same in zip(values.split(7), restored.split(7), strict=True):
        part = Fidelity()
        part.update(some, same)
        parts.merge(part)
    merged, expected = (meter.figures().model_dump(exclude_none=True) for meter in (parts, whole))
    assert merged == pytest.approx(expected, rel=1e-6)


def test_figures_of_shards_merge() -> None:
    a = FidelityFigures(tokens=10, nmse_mean=1e-5, nmse_worst=3e-5, cosine_mean=0.9998, cosine_worst=0.99)
    b = FidelityFigures(tokens=30, nmse_mean=2e-5, nmse_worst=2e-5, cosine_mean=0.9994, cosine_worst=0.98)
    merged = FidelityFigures.merge([a.model_dump(), {}, b.model_dump()])
    assert merged is not None
    assert merged.tokens == 40
    assert merged.nmse_worst == 3e-5
    assert merged.cosine_mean == pytest.approx(0.9995)
    assert merged.cosine_worst == 0.98
    assert merged.summary is None
    assert FidelityFigures.merge([{}]) is None


def test_figures_of_class_tokens_are_kept_apart() -> None:
    """A commit without them has the keys that it always had."""
    a, b = (
        FidelityFigures(tokens=n, nmse_mean=0, nmse_worst=worst, cosine_mean=1, cosine_worst=1)
        for n, worst in ((1, 3e-2), (3, 2e-2))
    )
    both = a.model_copy(update={"summary": b})
    merged = FidelityFigures.merge(f.model_dump(exclude_none=True) for f in (a, both, both))
    assert merged is not None
    assert merged.summary is not None
    assert (merged.tokens, merged.nmse_worst) == (3, 3e-2)
    assert (merged.summary.tokens, merged.summary.nmse_worst) == (6, 2e-2)
    assert "summary" not in a.model_dump(exclude_none=True)
    with pytest.raises(CacheError, match=r"stored class tokens are not faithful: worst channel NMSE 0\.02"):
        a.model_copy(update={"nmse_worst": 0.0, "summary": b}).check(max_nmse=1e-2, min_cosine=0.999)


def test_the_bound_is_kept() -> None:
    figures = FidelityFigures(tokens=1, nmse_mean=0, nmse_worst=2e-4, cosine_mean=0.9999, cosine_worst=0.9)
    figures.check(max_nmse=3e-4, min_cosine=0.999)
    with pytest.raises(CacheError, match=r"worst channel NMSE 0.0002 \(at most 0.0001\)"):
        figures.check(max_nmse=1e-4, min_cosine=0.999)
    with pytest.raises(CacheError, match="not faithful"):
        figures.check(max_nmse=1e-3, min_cosine=0.99999)


def test_flat_tokens_count_as_kept() -> None:
    meter = Fidelity()
    meter.update(torch.ones(2, 3, 4), torch.ones(2, 3, 4))
    assert meter.figures().model_dump(exclude_none=True) == {
        "tokens": 6,
        "nmse_mean": 0,
        "nmse_worst": 0,
        "cosine_mean": 1,
        "cosine_worst": 1,
    }
    assert Fidelity().figures().tokens == 0


def test_int8_on_channels_of_any_spread_is_faithful() -> None:
    """Standardising first keeps every small channel; plain per-token int8 would lose percents of it."""
    values = tokens(5, n=64, L=49, D=64)
    quantiser = Quantiser.calibrate("int8", values[:16])
    meter = Fidelity()
    meter.update(values, quantiser.dequantise(*quantiser.quantise(values)))
    meter.figures().check(max_nmse=1e-4, min_cosine=0.9995)
    plain = Quantiser("int8", np.zeros(64, np.float32), np.ones(64, np.float32))
    worse = Fidelity()
    worse.update(values, plain.dequantise(*plain.quantise(values)))
    assert worse.figures().nmse_worst > 1e-2
