import numpy as np
import pytest
from scipy.stats import chisquare

from pipeline.data.masks import Focus, draw_masks

ATTENTION = np.random.default_rng(0).dirichlet(np.full(64, 0.5)).astype(np.float16)


@pytest.mark.parametrize("focus", ["sampled", "top-k", "random"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_share_kept_is_exact(focus: Focus, count: int) -> None:
    for index in range(50):
        ids = draw_masks(ATTENTION, 64, 16, focus, 0, 0, index, count)
        assert ids.shape == (count, 16)
        assert ids.dtype == np.int64
        assert (np.diff(ids, axis=1) > 0).all()  # ascending, no patch twice
        assert ids.min() >= 0
        assert ids.max() < 64


def test_top_k_keeps_the_top() -> None:
    ids = draw_masks(ATTENTION, 64, 16, "top-k", 0, 0, 0, 1)[0]
    assert set(ids) == set(np.argsort(-ATTENTION.astype(float), kind="stable")[:16])


def test_sampling_follows_the_attention() -> None:
    """With one patch kept, the pick is a draw from the attention itself."""
    probability = np.array([0.5, 0.25, 0.15, 0.1])
    picks = [draw_masks(probability, 4, 1, "sampled", 3, 0, index, 1)[0, 0] for index in range(4000)]
    assert chisquare(np.bincount(picks, minlength=4), probability * 4000).pvalue > 1e-3


def test_sampling_without_replacement_matches_sequential_draws() -> None:
    probability = np.array([0.6, 0.3, 0.1])
    pairs = [tuple(draw_masks(probability, 3, 2, "sampled", 3, 1, index, 1)[0]) for index in range(6000)]
    expected = {(0, 1): 0.6 * 0.75 + 0.3 * 6 / 7, (0, 2): 0.6 * 0.25 + 0.1 * 6 / 9, (1, 2): 0.3 / 7 + 0.1 / 3}
    counts = [pairs.count(pair) for pair in expected]
    assert chisquare(counts, [share * 6000 for share in expected.values()]).pvalue > 1e-3


def test_random_is_uniform() -> None:
    picks = np.concatenate([draw_masks(None, 16, 4, "random", 0, 0, index, 1)[0] for index in range(3000)])
    assert chisquare(np.bincount(picks, minlength=16)).pvalue > 1e-3


def test_random_masks_of_one_sample_are_complementary() -> None:
    ids = draw_masks(None, 64, 16, "random", 0, 0, 0, 4)
    assert sorted(ids.ravel()) == list(range(64))


def test_zero_attention_stays_possible_and_finite() -> None:
    ids = draw_masks(np.zeros(16, np.float16), 16, 16, "sampled", 0, 0, 0, 1)
    assert sorted(ids[0]) == list(range(16))


def test_masks_change_with_epoch_index_and_seed() -> None:
    masks = {
        tuple(draw_masks(ATTENTION, 64, 16, "sampled", s, e, i, 1)[0])
        for s in range(2)
        for e in range(3)
        for i in range(5)
    }
    assert len(masks) == 30
