"""A finished cache of each kind."""

from pathlib import Path

import pytest

from tests.test_pipeline.cache.samples import STORES, make_cache, make_header


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cache(tmp_path: Path, store: str) -> Path:
    """10 samples in 3 shards, 2 views; sample 5 is a tombstone."""
    return make_cache(tmp_path / "cache", make_header(store), {5: "cannot identify image file"})
