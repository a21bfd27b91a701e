"""The codes quantiser: nearest centroids, a codebook that k-means gives, and headers that carry it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from pipeline.cache import Quantiser, create_cache, match_header, open_cache, open_writer, read_header
from pipeline.cache.format.codes import MAX_CLUSTERS, fit_codebook
from pipeline.errors import CacheDamage, CacheError
from tests.test_pipeline.cache.samples import CLUSTERS, STORES, make_cache, make_header, make_shard


def blobs(count: int = 1500, dim: int = 6, centres: int = 12, seed: int = 0) -> torch.Tensor:
    """Tokens [count, dim] around some centres, as overlapping as a teacher's."""
    random = np.random.default_rng(seed)
    middle = 1.5 * random.normal(size=(centres, dim))
    tokens = middle[random.integers(centres, size=count)] + random.normal(size=(count, dim))
    return torch.from_numpy(tokens.astype(np.float32))


def inertia(tokens: torch.Tensor, centroids: np.ndarray) -> float:
    return float(torch.cdist(tokens, torch.from_numpy(centroids.astype(np.float32))).amin(1).square().sum())


def calibrated(clusters: int = 5) -> tuple[Quantiser, torch.Tensor]:
    """A quantiser, and tokens [4, 25, 6] whose channels differ in mean and deviation by a factor of 60."""
    tokens = blobs(100).view(4, 25, 6) * torch.logspace(0, 1.8, 6) + 3
    return Quantiser.calibrate("codes", tokens, clusters), tokens


def test_the_codebook_is_as_good_as_scikit_learns() -> None:
    tokens = blobs()
    theirs = KMeans(24, n_init=1, random_state=0).fit(tokens.numpy())
    assert inertia(tokens, fit_codebook(tokens, 24)) < 1.05 * theirs.inertia_


def test_the_codebook_is_the_same_again() -> None:
    tokens = blobs()
    np.testing.assert_array_equal(fit_codebook(tokens, 24), fit_codebook(tokens, 24))


def test_an_empty_cluster_takes_a_token_that_is_far_from_its_own() -> None:
    """Nine in ten tokens are the same: most clusters start there, and all but one of them are empty at once."""
    far = 10 * torch.eye(7)
    tokens = torch.cat([torch.zeros(63, 7), far])
    found = fit_codebook(tokens, 8)
    assert {tuple(row) for row in found.tolist()} == {tuple(row) for row in [*far.tolist(), [0.0] * 7]}


def test_codes_are_the_nearest_centroids_of_standardised_tokens() -> None:
    quantiser, tokens = calibrated()
    stored, scale = quantiser.quantise(tokens)
    assert (stored.dtype, tuple(stored.shape), scale) == (torch.uint16, (4, 25, 1), None)
    standardised = ((tokens - torch.from_numpy(quantiser.mean)) / torch.from_numpy(quantiser.std)).view(100, 6)
    centroids = torch.from_numpy(quantiser.centroids.astype(np.float32))
    expected = torch.cdist(standardised.double(), centroids.double()).argmin(1)
    assert torch.equal(stored.view(-1).long(), expected)
    restored = quantiser.dequantise(stored, None)
    features = quantiser.centroids.astype(np.float32) * quantiser.std + quantiser.mean
    np.testing.assert_allclose(restored.view(100, 6).numpy(), features[expected.numpy()], rtol=1e-6)
    assert torch.equal(quantiser.quantise(restored)[0], stored)
    with torch.autocast("cpu", torch.bfloat16):  # the step that measures gradient norms quantises resized targets
        assert torch.equal(quantiser.quantise(tokens)[0], stored)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_token_that_is_not_finite_shows_and_harms_nothing(bad: float) -> None:
    quantiser, tokens = calibrated()
    tokens[1, 2, 3] = bad
    stored, _ = quantiser.quantise(tokens)
    assert [quantiser.sound(view.numpy()) for view in stored] == [True, False, True, True]
    stored[2, 0] = 60_000  # as a crafted cache may have it
    restored = quantiser.dequantise(stored, None)
    assert restored[1, 2].isnan().all()
    assert restored[2, 0].isnan().all()
    assert restored[0].isfinite().all()


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(CacheError, match=r"100 tokens are too few for 101 clusters: .* or fewer clusters"):
        calibrated(101)


def test_a_codebook_that_no_header_could_hold_is_refused() -> None:
    with pytest.raises(CacheError, match=r"65535 x 1025 numbers is more than cache.json may hold"):
        fit_codebook(torch.zeros(1, 1025).expand(70_000, 1025), 65_535)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"centroids": "no base64!"}, "must be base64 of 8 x 8 float16 numbers"),
        ({"centroids": 3}, "must be base64"),
        ({"centroids": None}, "must be base64"),
        ({"clusters": 9}, "must be base64 of 9 x 8"),
        ({"clusters": -8}, "must be base64"),
        ({"clusters": "8"}, "must be base64"),
        ({"clusters": 8.0}, "must be base64"),
        ({"clusters": 1, "centroids": "AAAAAAAAAAAAAAAAAAAAAA=="}, f"must be 2 to {MAX_CLUSTERS} rows of finite"),
        ({"centroids": "AAB+" * 43 + "AAA="}, "must be base64"),
    ],
)
def test_codebooks_that_cannot_be_are_refused(changes: dict[str, object], problem: str, tmp_path: Path) -> None:
    state = make_header(quantiser_name="codes").quantiser_state
    with pytest.raises(CacheError, match=problem):
        Quantiser.from_json(state | changes)
    fields = {**make_header(quantiser_name="codes").to_json(), "quantiser": state | changes}
    (tmp_path / "cache.json").write_text(json.dumps(fields, sort_keys=True, indent=1) + "\n")
    with pytest.raises(CacheDamage, match=problem) as refused:
        read_header(tmp_path)
    assert len(str(refused.value).splitlines()) == 1


def test_a_codebook_that_is_not_finite_is_refused() -> None:
    centroids = np.zeros((2, 3), np.float16)
    centroids[1, 2] = np.inf
    with pytest.raises(CacheError, match="rows of finite numbers"):
        Quantiser("codes", np.zeros(3), np.ones(3), centroids)


def test_another_number_of_clusters_is_another_cache(tmp_path: Path) -> None:
    found = make_header(quantiser_name="codes")
    match_header(tmp_path, found, make_header(quantiser={"name": "codes", "clusters": CLUSTERS}))
    with pytest.raises(CacheError, match=r"quantiser\.clusters is 8 there, 9 here"):
        match_header(tmp_path, found, make_header(quantiser={"name": "codes", "clusters": 9}))


def test_codes_keep_no_class_token() -> None:
    with pytest.raises(ValueError, match="quantiser codes keeps no class token"):
        make_header(quantiser={"name": "codes", "clusters": 8}, summary="class")


@pytest.mark.parametrize("store", STORES)
def test_a_code_of_no_cluster_is_damage_although_its_checksum_is_right(tmp_path: Path, store: str) -> None:
    header = make_header(store, quantiser_name="codes")
    create_cache(tmp_path, header)
    data = make_shard(header, 0)
    data.tokens[2, 1, 3] = CLUSTERS
    open_writer(tmp_path).write_shard(0, data)
    reader = open_cache(tmp_path)
    reader.read(2, 0)
    with pytest.raises(CacheDamage, match="shard 0, sample 2, view 1: a token is of no cluster of the codebook; run"):
        reader.read(2, 1)


def test_a_view_takes_two_bytes_a_token(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache", make_header(quantiser_name="codes", attention="none", grid=[14, 14]))
    chunk = (path / "tokens/c.0.0.0.0").stat().st_size
    assert chunk == 4 * 392 + 4  # four samples a shard, and the checksum of the chunk
