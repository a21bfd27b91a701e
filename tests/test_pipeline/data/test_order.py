import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from pipeline.configs.data import OrderKind
from pipeline.data.order import EpochOrder, Permutation


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**60), st.integers(0, 1000))
def test_a_permutation_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(Permutation.keyed(n, seed, epoch)(np.arange(n))), np.arange(n))


@pytest.mark.parametrize("n", [10, 100])
def test_every_place_is_equally_likely(n: int) -> None:
    firsts = [int(Permutation.keyed(n, 1, epoch)(np.array([3]))[0]) for epoch in range(100 * n)]
    assert chisquare(np.bincount(firsts, minlength=n)).pvalue > 1e-3


@pytest.mark.parametrize("kind", ["full", "block"])
@pytest.mark.parametrize("live", [np.arange(1000), np.setdiff1d(np.arange(1000), [0, 5, 64, 65, 999]), np.arange(7)])
def test_an_epoch_is_every_live_sample_once_in_any_slicing(kind: OrderKind, live: np.ndarray) -> None:
    order = EpochOrder(live, seed=3, kind=kind, block_size=64, window=4)
    whole = order.take(2, np.arange(len(live)))
    assert np.array_equal(np.sort(whole), live)
    for start in range(0, len(live), 37):
        stop = min(start + 37, len(live))
        fresh = EpochOrder(live, seed=3, kind=kind, block_size=64, window=4)  # O(1) seek: no history needed
        assert np.array_equal(fresh.take(2, np.arange(start, stop)), whole[start:stop])
    if len(live) > 20:
        assert not np.array_equal(order.take(3, np.arange(len(live))), whole)


def test_block_order_stays_inside_its_window() -> None:
    order = EpochOrder(np.arange(64 * 16), seed=0, kind="block", block_size=64, window=4)
    for start in range(0, 1024, 256):
        assert len(np.unique(order.take(0, np.arange(start, start + 256)) // 64)) == 4
