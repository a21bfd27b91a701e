"""What a bucket costs: its records beside those of a local copy, and its bytes beside those that cache-copy moves."""

import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from pipeline.cache import CacheReader, FetchAhead, LocalFolder, RemoteCache, open_cache, open_mirror
from pipeline.data.order import EpochOrder
from stages import cache_copy
from tests.servers import upload
from tests.test_pipeline.cache.samples import STORES, make_cache, make_header

log = logging.getLogger(__name__)
ROUNDS = 5


def read_epoch(reader: CacheReader, order: EpochOrder, epoch: int) -> float:
    """Seconds that an epoch takes in block order."""
    began = time.perf_counter()
    for index in order.take(epoch, np.arange(len(reader))).tolist():
        reader.read(index, 0, keep=False)
    return time.perf_counter() - began


@pytest.fixture
def disk() -> Iterator[Path]:
    """A folder on a disk: in memory, where other tests' files lie, syncing what is copied would cost nothing."""
    with TemporaryDirectory(dir="/var/tmp") as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize("store", STORES)
def test_rates_beside_those_of_a_local_copy(store: str, s3: str, disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Records of 76 KB, 96 a shard. They are measured in turns, and the best of ten rounds counts."""
    caplog.set_level(logging.INFO, __name__)
    dataset = {"source": "photos", "kind": "folder", "count": 960, "digest": "d" * 32}
    views = {"count": 1, "seed": 3, "image_size": 32}
    header = make_header(store, grid=[14, 14], dim=384, dataset=dataset, views=views, samples_per_shard=96)
    cache, url = make_cache(disk / "cache", header), f"s3://bucket/{store}"
    upload(cache, url)
    order = EpochOrder(np.arange(header.count), 0, "block", header.samples_per_shard, 4)

    local, warm = open_cache(cache), open_cache(RemoteCache(url, LocalFolder(disk / "warm", 10**10)))
    seconds: dict[str, list[float]] = {"local": [], "warm": []}
    read_epoch(warm, order, 0)
    for number in range(2 * ROUNDS):
        for name, reader in (("local", local), ("warm", warm))[:: 1 if number % 2 else -1]:
            seconds[name].append(read_epoch(reader, order, number))
    share = min(seconds["local"]) / min(seconds["warm"])
    log.info("%s: warm %.0f records/s, %.3f of local", store, header.count / min(seconds["warm"]), share)

    size = sum(open_mirror(warm.shards.remote).size(shard) for shard in range(header.shards))
    turns: dict[str, list[float]] = {"copied": [], "cold": []}
    for number in range(2 * ROUNDS):
        turns["copied"].append(_copy(url, disk / f"copy{number}"))
        turns["cold"].append(_read_cold(url, disk / f"cold{number}", order))
    copied, cold = min(turns["copied"]), min(turns["cold"])
    rates = size / copied / 1e6, size / cold / 1e6, copied / cold
    log.info("%s: cache-copy %.0f MB/s, cold %.0f MB/s: %.3f", store, *rates)
    assert share >= 0.95
    assert copied / cold >= 0.8


def _copy(url: str, target: Path) -> float:
    began = time.perf_counter()
    cache_copy.run(cache_copy.CacheCopyConfig.model_validate({"source": url, "target": str(target)}))
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def _read_cold(url: str, local: Path, order: EpochOrder) -> float:
    """An epoch from an empty folder, the shards fetched ahead as in a run."""
    began = time.perf_counter()
    reader = open_cache(RemoteCache(url, LocalFolder(local, 10**10)))
    fetcher = FetchAhead([reader.shards])
    try:
        windows = order.windows(0, int(order.take(0, np.arange(1))[0]), 4)
        fetcher.want([shard for window in windows for shard in window])
        read_epoch(reader, order, 0)
    finally:
        fetcher.close()
    seconds = time.perf_counter() - began
    shutil.rmtree(local)
    return seconds
