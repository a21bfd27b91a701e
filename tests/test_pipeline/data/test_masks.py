from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare

from pipeline.configs.data import Focus
from pipeline.data.masks import MaskSampler, predicted_count, select_predicted, select_visible, visible_count

ATTENTION = np.random.default_rng(0).dirichlet(np.full(64, 0.5)).astype(np.float16)


def draw_masks(
    attention: NDArray[Any] | None, samples: list[tuple[int, int]], patches: int, keep: int, focus: Focus, seed: int,
    count: int = 1,
) -> NDArray[np.int64]:  # fmt: skip
    return MaskSampler(patches, keep, focus, seed, count).draw(attention, samples)


def samples(count: int) -> list[tuple[int, int]]:
    return [(0, index) for index in range(count)]


@pytest.mark.parametrize("ratio", ["0.25", "0.4", "0.5", "0.6", "0.7", "0.75", "0.8", "0.85", "0.9", "0.95", "0.99"])
def test_the_visible_patches_are_counted_without_rounding_errors(ratio: str) -> None:
    """Exactly, on every square grid up to 64 × 64 and some others; as before wherever that was right."""
    for patches in [side * side for side in range(2, 65)] + [3 * 5, 14 * 28, 16 * 20]:
        exact = max(1, int(patches * (1 - Fraction(ratio))))
        assert visible_count(patches, float(ratio)) == exact
        assert exact - max(1, int(patches * (1 - float(ratio)))) in (0, 1)  # what a plain product lost


def test_ratios_that_are_no_decimals_count_as_exactly() -> None:
    for patches in (7, 14, 49, 196):
        for masked in range(1, patches):
            assert visible_count(patches, masked / patches) == patches - masked
    assert [visible_count(196, ratio) for ratio in (0.75, 0.9, 0.999)] == [49, 19, 1]
    assert visible_count(400, 0.8) == 80


@pytest.mark.parametrize("focus", ["sampled", "top-k", "random"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_share_kept_is_exact(focus: Focus, count: int) -> None:
    ids = draw_masks(np.tile(ATTENTION, (50, 1)), samples(50), 64, 16, focus, 0, count)
    assert ids.shape == (50, count, 16)
    assert ids.dtype == np.int64
    assert (np.diff(ids, axis=2) > 0).all()  # ascending, no patch twice
    assert ids.min() >= 0
    assert ids.max() < 64


def test_top_k_keeps_the_top() -> None:
    ids = draw_masks(ATTENTION[None], samples(1), 64, 16, "top-k", 0)[0, 0]
    assert set(ids) == set(np.argsort(-ATTENTION.astype(float), kind="stable")[:16])


def test_sampling_follows_the_attention() -> None:
    """With one patch kept, the pick is a draw from the attention itself."""
    probability = np.array([0.5, 0.25, 0.15, 0.1])
    picks = draw_masks(np.tile(probability, (4000, 1)), samples(4000), 4, 1, "sampled", 3)[:, 0, 0]
    assert chisquare(np.bincount(picks, minlength=4), probability * 4000).pvalue > 1e-3


def test_sampling_without_replacement_matches_sequential_draws() -> None:
    probability = np.array([0.6, 0.3, 0.1])
    pairs = list(map(tuple, draw_masks(np.tile(probability, (6000, 1)), samples(6000), 3, 2, "sampled", 3)[:, 0]))
    expected = {(0, 1): 0.6 * 0.75 + 0.3 * 6 / 7, (0, 2): 0.6 * 0.25 + 0.1 * 6 / 9, (1, 2): 0.3 / 7 + 0.1 / 3}
    counts = [pairs.count(pair) for pair in expected]
    assert chisquare(counts, [share * 6000 for share in expected.values()]).pvalue > 1e-3


def test_random_is_uniform() -> None:
    picks = draw_masks(None, samples(3000), 16, 4, "random", 0)
    assert chisquare(np.bincount(picks.ravel(), minlength=16)).pvalue > 1e-3


def test_random_masks_of_one_sample_are_complementary() -> None:
    ids = draw_masks(None, samples(2), 64, 16, "random", 0, 4)
    assert sorted(ids[1].ravel()) == list(range(64))


def test_zero_attention_stays_possible_and_finite() -> None:
    ids = draw_masks(np.zeros((1, 16), np.float16), samples(1), 16, 16, "sampled", 0)
    assert sorted(ids[0, 0]) == list(range(16))


def test_masks_change_with_epoch_index_and_seed() -> None:
    every = [(epoch, index) for epoch in range(3) for index in range(5)]
    drawn = [draw_masks(np.tile(ATTENTION, (15, 1)), every, 64, 16, "sampled", seed)[:, 0] for seed in range(2)]
    assert len(set(map(tuple, np.concatenate(drawn)))) == 30


@pytest.mark.parametrize("focus", ["sampled", "top-k", "random"])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_mask_does_not_depend_on_its_company(focus: Focus, count: int) -> None:
    attention = np.random.default_rng(1).dirichlet(np.full(64, 0.5), 33).astype(np.float16)
    every = [(7, 3 * index) for index in range(33)]
    together = draw_masks(attention, every, 64, 16, focus, 5, count)
    for row in range(33):
        alone = draw_masks(attention[row : row + 1], every[row : row + 1], 64, 16, focus, 5, count)
        assert np.array_equal(alone[0], together[row])


def test_masks_by_attention_are_complementary_and_the_first_is_what_one_alone_would_be() -> None:
    attention = np.tile(ATTENTION, (200, 1))
    ids = draw_masks(attention, samples(200), 64, 16, "sampled", 0, 4)
    assert (np.sort(ids.reshape(200, 64)) == np.arange(64)).all()
    assert np.array_equal(ids[:, :1], draw_masks(attention, samples(200), 64, 16, "sampled", 0, 1))
    shown = ATTENTION.astype(np.float64)[ids].sum(axis=(0, 2))  # attention that each of the four masks shows
    assert (np.diff(shown) < 0).all()
    on_device = select_visible(
        torch.from_numpy(attention),
        torch.from_numpy(MaskSampler(64, 16, "sampled", 0, 4).noise(samples(200))[:, 0]),
        16,
        4,
    )
    assert np.array_equal(on_device.view(200, 4, 16).numpy(), ids)


def test_masks_that_cant_be_disjoint_are_drawn_apart() -> None:
    """As are those of a run from before: mask by mask as if it were the only one."""
    attention = np.tile(ATTENTION, (20, 1))
    for sampler in (MaskSampler(64, 16, "sampled", 0, 5), MaskSampler(64, 16, "sampled", 0, 4, independent=True)):
        assert not sampler.shares_a_draw
        noise = sampler.noise(samples(20))
        apart = [
            select_visible(torch.from_numpy(attention), torch.from_numpy(noise[:, mask]), 16)
            for mask in range(sampler.count)
        ]
        assert np.array_equal(sampler.draw(attention, samples(20)), torch.stack(apart, 1).numpy())


def test_the_predicted_patches_are_a_share_of_all_or_all_masked_ones() -> None:
    assert [predicted_count(196, 49, share) for share in (0.25, 0.5, 0.001)] == [49, 98, 1]
    assert predicted_count(36, 9, 0.25) == 9
    assert [predicted_count(196, 49, share) for share in (0.75, 0.8, 1.0)] == [None, None, None]


def test_predicted_patches_are_masked_ones_drawn_evenly_by_seed_epoch_and_index() -> None:
    requests = [(epoch, index) for epoch in range(2) for index in range(400)]
    sampler = MaskSampler(16, 4, "random", 0, 2, predict=3)
    ids_keep, lots = sampler.draw(None, requests), sampler.lots(requests)
    ids = np.stack([sampler.ids_predict(keep, row) for keep, row in zip(ids_keep, lots, strict=True)])
    assert ids.shape == (800, 2, 3)
    assert (np.diff(ids, axis=2) > 0).all()  # ascending, no patch twice
    assert not (ids[..., None] == ids_keep[:, :, None]).any()  # none of them is visible
    assert chisquare(np.bincount(ids.ravel(), minlength=16)).pvalue > 1e-3
    on_device = select_predicted(torch.from_numpy(lots).flatten(0, 1), torch.from_numpy(ids_keep).flatten(0, 1), 3)
    assert np.array_equal(on_device.view(800, 2, 3).numpy(), ids)
    assert np.array_equal(sampler.lots(requests[5:6])[0], lots[5])  # whatever company it is in
    assert len({tuple(row.ravel()) for row in lots}) == 800
    other_seed = MaskSampler(16, 4, "random", 1, 2, predict=3)
    assert not (other_seed.lots(requests) == lots).any()
    assert not (sampler.noise(requests) == lots).any()  # a stream of its own
