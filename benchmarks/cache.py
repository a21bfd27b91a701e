"""Cache reads, writes and verification against bare loops.

A bare loop does the least that could do the job:

    mrmae benchmark cache
    mrmae benchmark cache path=/data/clip

Each ratio is the bare loop's time over the cache's, by turns in one process:

    read          checked reads of visible rows, against pread + crc32c (aim: 0.8)
    read_tight    the same, against that loop with the cache's own, faster checksum library
    npy           the same, against the webdataset library's decoding of .npy members (aim: 10)
    write         write_shard with its commit, against plain writes with the same fsyncs (aim: 0.7)
    verify        verify at level full, against xxh3-128 by hashlib.file_digest (aim: 0.45)
    shards        records read as in training from a few and from many shards: `over_fewest` is the time of a record
                  over that of the first lane (aim: 1.5)

All but `verify` run in one thread; it hashes files in a second. Files are warm: the figures show the cache's overhead,
not the disk's rate. The bare loop of `read` has the records' bytes in plain files. The lanes of `shards` read sparse
files with whole tables, as many different records from few shards as from many.

Reads a cache (path) or writes a synthetic one into a temporary folder. Costs about two minutes and 5 GB.
"""

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from awscrt.checksums import crc32c
from numpy.typing import NDArray

from benchmarks import bare_cache
from benchmarks.configs.cache import BenchmarkCacheConfig
from benchmarks.harness import Bench, by_turns, open_bench
from benchmarks.random_cache import random_header, random_shard, write_random_cache
from benchmarks.sparse_cache import create_sparse_cache, filled_rows
from pipeline.cache import (
    CacheHeader,
    CacheReader,
    create_cache,
    open_cache,
    open_writer,
    read_commit,
    verify,
)
from pipeline.data.order import EpochOrder
from pipeline.errors import CacheError

Job = Callable[[], object]


def run(config: BenchmarkCacheConfig) -> dict[str, Any]:
    """Measure; returns JSON-able figures by store: each has the median ratio, its range and both rates.

    Raises:
        CacheError: the cache at `path` holds no sample that can be read.
    """
    with open_bench(device="cpu", threads=1, folder=config.folder) as bench:
        if config.path is not None:
            store = open_cache(config.path).header.store
            return bench.report(config, {store: _measure_reading(config, config.path, bench)})
        return bench.report(config, {store: _measure_store(config, store, bench) for store in ("zarr", "webdataset")})


def _measure_store(config: BenchmarkCacheConfig, store: str, bench: Bench) -> dict[str, Any]:
    header, path = _random_header(config, store, config.samples), bench.folder / store
    write_random_cache(path, header, config.image_bytes)
    figures = _measure_reading(config, path, bench)
    shutil.rmtree(path)
    return figures | {
        "write": _measure_writing(config, header, bench),
        "shards": _measure_many_shards(config, store, bench) if config.shards else {},
    }


def _random_header(config: BenchmarkCacheConfig, store: str, samples: int) -> CacheHeader:
    return random_header(store, samples, config.samples_per_shard, config.grid, config.dim, config.quantiser)


def _compare(bench: Bench, bare: Job, job: Job, repeats: int, amount: int, unit: str) -> dict[str, Any]:
    """The bare loop's time over the cache's, and what both do a second."""
    rounds = by_turns(bench.lanes({"bare": bare, "cache": job}), repeats)
    rates = rounds.rates(amount)
    return rounds.ratio("bare", "cache") | {
        f"bare_{unit}_per_second": rates["bare"],
        f"{unit}_per_second": rates["cache"],
    }


def _measure_reading(config: BenchmarkCacheConfig, path: Path, bench: Bench) -> dict[str, Any]:
    """Reads and verification of one cache."""
    reader = open_cache(path)
    random = np.random.default_rng(config.seed)
    live = reader.live_indices()
    if len(live) == 0:
        raise CacheError(f"{path} holds no sample that can be read; extract some shards first")
    indices = random.permutation(live)[: config.samples].tolist()
    tokens = reader.header.tokens
    rows = np.sort(random.permutation(tokens)[: max(1, round(tokens * config.visible))])

    read_rows = partial(_read_as_training, reader, indices, rows)
    missing = set(reader.missing_shards())
    commits = [read_commit(path, reader.header, shard) for shard in range(reader.header.shards) if shard not in missing]
    files = [path / file for commit in commits for file in commit.files]
    size = sum(entry.bytes for commit in commits for entry in commit.files.values())
    compare = partial(_compare, bench)
    with bare_cache.plain_reads(reader, indices, bench.folder) as bare:
        read = compare(partial(bare, google_crc32c.value), read_rows, config.repeats, len(indices), "records")
        read_tight = compare(partial(bare, crc32c), read_rows, config.repeats, len(indices), "records")
    with bare_cache.npy_reads(reader, indices, bench.folder) as bare_npy:
        npy = compare(bare_npy, read_rows, max(3, config.repeats // 3), len(indices), "records")
    digest = partial(bare_cache.digest_files, files)
    check = compare(digest, partial(verify, path, "full"), config.repeats, size, "bytes")
    return {"read": read, "read_tight": read_tight, "npy": npy, "verify": check}


def _measure_writing(config: BenchmarkCacheConfig, header: CacheHeader, bench: Bench) -> dict[str, Any]:
    """One shard, written again and again."""
    path, plain, data = bench.folder / "written", bench.folder / "plain", random_shard(header, 0, config.image_bytes)
    create_cache(path, header)
    before = {file for file in path.rglob("*") if file.is_file()}
    writer = open_writer(path)
    writer.write_shard(0, data)
    written = [file for file in path.rglob("*") if file.is_file() and file not in before]
    contents = {plain / file.relative_to(path): file.read_bytes() for file in written}
    size = sum(map(len, contents.values()))
    bare, write = partial(bare_cache.write_files, contents), partial(writer.write_shard, 0, data)
    figures = _compare(bench, bare, write, config.repeats, size, "bytes")
    shutil.rmtree(path)
    shutil.rmtree(plain)
    return figures


def _measure_many_shards(config: BenchmarkCacheConfig, store: str, bench: Bench) -> dict[str, Any]:
    """Shuffled reads of visible rows from few and many shards of one sparse cache, by turns."""
    size, counts, path = config.samples_per_shard, sorted(config.shards), bench.folder / "sparse"
    header = _random_header(config, store, counts[-1] * size)
    wanted = {count: min(size, -(-config.shard_records // count)) for count in counts}
    filled = [wanted[next(count for count in counts if shard < count)] for shard in range(header.shards)]
    create_sparse_cache(path, header, filled, config.image_bytes)
    began = time.perf_counter()
    reader = open_cache(path)
    opened = time.perf_counter()
    reader.load_tables()
    loaded = time.perf_counter()
    rows = np.arange(max(1, round(header.tokens * config.visible)))
    jobs, records = dict[str, Job](), dict[str, int]()
    for count in counts:
        kept = [filled_rows(header, shard, filled[shard])[: wanted[count]] + shard * size for shard in range(count)]
        order = EpochOrder(np.concatenate(kept), config.seed, "full", size, 1)
        indices = order.take(0, np.arange(len(order))).tolist()
        records[str(count)] = len(indices)
        jobs[str(count)] = partial(_read_as_training, reader, indices, rows)
    traffic = {lane: bare_cache.reads_and_bytes(job) for lane, job in jobs.items()}
    rounds = by_turns(bench.lanes(jobs), config.repeats)
    shutil.rmtree(path)
    fewest = str(counts[0])
    lanes = {
        lane: {
            "over_fewest": rounds.ratio(lane, fewest)["ratio"] * records[fewest] / records[lane],
            "microseconds_per_record": 1e6 * rounds.median(lane) / records[lane],
            "reads_per_record": traffic[lane][0] / records[lane],
            "bytes_per_record": traffic[lane][1] / records[lane],
        }
        for lane in jobs
    }
    return {"open_seconds": opened - began, "load_tables_seconds": loaded - opened, **lanes}


def _read_as_training(reader: CacheReader, indices: list[int], rows: NDArray[np.int64]) -> None:
    """Read as a training's dataset does: a record's arrays last until the next one is read."""
    for index in indices:
        record = reader.read(index, 0, keep=False)
        record.tokens.take(rows, 0)
        if record.scale is not None:
            record.scale.take(rows)
