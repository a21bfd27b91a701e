"""`mrmae benchmark cache`: how close the cache comes to what the machine can do. JSON; ratios, since machines differ.

Every figure pairs our code with the least that could do the job, over the same files, in turn and in one process:

    read          checked reads of visible rows      against pread + crc32c in a bare loop        (aim: >= 0.8)
    read_tight    the same reads                     against that loop with our checksum's library
    npy           the same reads                     against the webdataset library's .npy decode (aim: >= 10)
    write         write_shard, with its commit       against plain writes and the same fsyncs     (aim: >= 0.7)
    verify        verify at level full               against xxh3-128 by hashlib.file_digest      (aim: >= 0.7)
    verify_tight  the same                           against xxh3-128 and our crc32c over our own blocks
    shards        reads as training does them, from  against the fewest shards; microseconds, reads and bytes a record
                  100, 600 and 1,252 shards          (aim: <= 1.5)

The loop of `read` takes google-crc32c, which zarr takes too; the cache itself takes awscrt's, which is twice as fast.
Verification walks every byte twice, by the file's hash and by the records' checksums, and reads ahead in a second
thread; `file_digest` does it once, in one thread. The tight pairs hold us against a loop in one thread that has the
cache's own libraries and does nothing else.
Files are warm: the figures speak of our overhead, not of the disk. The cache of many shards consists of sparse files
with whole tables; as many different records are read from 100 of its shards as from all.
"""

import hashlib
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import google_crc32c
import numpy as np
import torch
import webdataset
import xxhash
from awscrt.checksums import crc32c
from numpy.typing import NDArray
from pydantic import Field, Strict

from benchmarks.sparse_cache import create_sparse_cache, filled_rows
from pipeline.cache import (
    CacheHeader,
    CacheReader,
    DatasetSection,
    Quantiser,
    ShardData,
    ViewSection,
    create_cache,
    open_cache,
    open_writer,
    read_commit,
    verify,
)
from pipeline.cache.files import BLOCK, Descriptor, aligned, file_of
from pipeline.cache.tar.view import index_of
from pipeline.config import Config, PathField
from pipeline.data.order import EpochOrder
from pipeline.errors import CacheError
from pipeline.files import sync

Pair = tuple[Callable[[], Any], Callable[[], Any]]  # bare, ours


class BenchmarkCacheConfig(Config):
    """What is measured. The defaults take about two minutes and 3 GB of disk."""

    path: PathField | None = None  # an existing cache; a synthetic one of each store when left out
    folder: PathField | None = None  # where synthetic caches go; the system's temporary folder when left out
    samples: int = Field(default=8192, ge=16)  # of a synthetic cache; of a given one, how many are read
    samples_per_shard: int = Field(default=1024, ge=8)
    grid: int = Field(default=14, ge=1)
    dim: int = Field(default=768, ge=1)
    image_bytes: int = Field(default=25_000, ge=1)
    visible: float = Field(default=0.25, gt=0, le=1)  # share of the rows that are taken
    repeats: int = Field(default=11, ge=1)  # pairs; the median counts
    shards: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Strict(False)] = (100, 600, 1252)  # ascending
    shard_records: int = Field(default=4096, ge=1)  # read from that many shards
    seed: int = 0


def run(config: BenchmarkCacheConfig) -> dict[str, Any]:
    """Measure, and return figures by store: each has the median ratio, both rates, and every ratio."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="mrmae-benchmark-", dir=config.folder) as name:
            return {"machine": _machine(), "config": config.model_dump(mode="json"), **_measure(config, Path(name))}
    finally:
        torch.set_num_threads(threads)


def _measure(config: BenchmarkCacheConfig, scratch: Path) -> dict[str, Any]:
    if config.path is not None:
        reader = open_cache(config.path)
        return {reader.header.store: _read_and_verify(config, config.path, scratch)}
    results: dict[str, Any] = {}
    for store in ("zarr", "webdataset"):
        header = _header(config, store)
        path = scratch / store
        _write_all(path, header, (_random_shard(config, header, shard) for shard in range(header.shards)))
        results[store] = _read_and_verify(config, path, scratch)
        shutil.rmtree(path)
        results[store]["write"] = _write(config, header, _random_shard(config, header, 0), scratch)
        results[store]["shards"] = _many_shards(config, store, scratch / "sparse")
        shutil.rmtree(scratch / "sparse", ignore_errors=True)
    return results


def _many_shards(config: BenchmarkCacheConfig, store: str, path: Path) -> dict[str, Any]:
    """Shuffled reads of visible rows from few and many shards of one sparse cache, by turns."""
    if not config.shards:
        return {}
    S, counts = config.samples_per_shard, sorted(config.shards)
    header = _header(config.model_copy(update={"samples": counts[-1] * S}), store)
    wanted = {count: min(S, -(-config.shard_records // count)) for count in counts}
    filled = [wanted[next(count for count in counts if shard < count)] for shard in range(header.shards)]
    create_sparse_cache(path, header, filled, config.image_bytes)
    began = time.perf_counter()
    reader = open_cache(path)
    opened = time.perf_counter()
    reader.load_tables()
    loaded = time.perf_counter()
    rows = np.arange(max(1, round(header.tokens * config.visible)))
    jobs, records = dict[int, Callable[[], None]](), dict[int, int]()
    for count in counts:
        kept = [filled_rows(header, shard, filled[shard])[: wanted[count]] + shard * S for shard in range(count)]
        indices = EpochOrder(np.concatenate(kept), config.seed, "full", S, 1)
        records[count] = len(indices)
        jobs[count] = _training_reads(reader, indices.take(0, np.arange(len(indices))).tolist(), rows)
    traffic = {count: _traffic(jobs[count]) for count in counts}  # warms files, too
    times = [{count: _seconds(job) / records[count] for count, job in jobs.items()} for _ in range(config.repeats)]
    lanes = {
        str(count): {
            "over_fewest": statistics.median(turn[count] / turn[counts[0]] for turn in times),
            "microseconds_per_record": 1e6 * statistics.median(turn[count] for turn in times),
            "reads_per_record": traffic[count][0] / records[count],
            "bytes_per_record": traffic[count][1] / records[count],
        }
        for count in counts
    }
    return {"open_seconds": opened - began, "load_tables_seconds": loaded - opened, **lanes}


def _training_reads(reader: CacheReader, indices: list[int], rows: NDArray[np.int64]) -> Callable[[], None]:
    """Read as a training's dataset does: a record's arrays last until the next one is read."""

    def read() -> None:
        for index in indices:
            record = reader.read(index, 0, keep=False)
            record.tokens.take(rows, 0)
            if record.scale is not None:
                record.scale.take(rows)

    return read


def _traffic(job: Callable[[], None]) -> tuple[int, int]:
    """Reading system calls of this process, and their bytes, once every file has been opened."""
    job()
    first, second = _io(), _io()  # looking is reading, too
    job()
    reads, size = (after - 2 * before + once for once, before, after in zip(first, second, _io(), strict=True))
    return reads, size


def _io() -> tuple[int, int]:
    """Reading system calls of this process so far, and their bytes."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["syscr"]), int(counts["rchar"])


def _read_and_verify(config: BenchmarkCacheConfig, path: Path, scratch: Path) -> dict[str, Any]:
    reader = open_cache(path)
    random = np.random.default_rng(config.seed)
    live = reader.live_indices()
    if len(live) == 0:
        raise CacheError(f"{path} holds no sample that can be read; extract some shards first")
    indices = random.permutation(live)[: config.samples].tolist()
    L = reader.header.tokens
    rows = np.sort(random.permutation(L)[: max(1, round(L * config.visible))])
    ours = _training_reads(reader, indices, rows)
    bare, tight = (_bare_reads(reader, indices, checksum) for checksum in (google_crc32c.value, crc32c))
    with _npy_tar(reader, indices, scratch) as npy:
        return {
            "read": _compare((bare, ours), config.repeats, len(indices), "records"),
            "read_tight": _compare((tight, ours), config.repeats, len(indices), "records"),
            "npy": _compare((npy, ours), max(3, config.repeats // 3), len(indices), "records"),
            "verify": _verify(path, reader, config.repeats, _digest_file),
            "verify_tight": _verify(path, reader, config.repeats, _both_sums),
        }


def _bare_reads(reader: CacheReader, indices: list[int], checksum: Callable[[bytes], int]) -> Callable[[], None]:
    """One pread and one crc32c for each file that a record's tensors lie in, nothing else."""
    places = list(_zarr_places(reader, indices) if reader.header.store == "zarr" else _tar_places(reader, indices))

    def bare() -> None:
        for record in places:
            for file, size, offset in record:
                checksum(os.pread(file.number, size, offset))

    return bare


def _zarr_places(reader: CacheReader, indices: list[int]) -> Iterator[list[tuple[Descriptor, int, int]]]:
    header = reader.header
    half = 2 * header.tokens
    sizes = {"tokens": half // 2 * header.dim * header.quantiser.dtype.itemsize}
    sizes |= {"scale": half} if header.quantiser.has_scale else {}
    sizes |= {"attention": 2 * int(np.prod(header.attention_shape))} if header.attention_shape else {}
    files: dict[tuple[str, int], Descriptor] = {}
    for index in indices:
        shard, row = divmod(index, header.samples_per_shard)
        for name in sizes:
            if (name, shard) not in files:
                found = next((reader.path / name).glob(f"c.{shard}.0.*"))
                files[name, shard] = Descriptor(found)
        yield [(files[name, shard], size, row * size) for name, size in sizes.items()]


def _tar_places(reader: CacheReader, indices: list[int]) -> Iterator[list[tuple[Descriptor, int, int]]]:
    tars: dict[int, tuple[Descriptor, list[list[int]]]] = {}
    for index in indices:
        shard, row = divmod(index, reader.header.samples_per_shard)
        if shard not in tars:
            tar = Descriptor(reader.path / "shards" / f"{shard:06d}-00.tar")
            tars[shard] = tar, index_of(tar, reader.header.shard_range(shard)).tolist()
        tar, rows = tars[shard]
        start, *sizes = rows[row]
        padded = sum(512 + -(-size // 512) * 512 for size in sizes[:2])
        yield [(tar, padded + 512 + sizes[2], start)]


@contextmanager
def _npy_tar(reader: CacheReader, indices: list[int], scratch: Path) -> Iterator[Callable[[], None]]:
    """The same records, with their image if there is one, as .npy members of a tar, decoded by webdataset."""
    path = scratch / "npy.tar"
    with webdataset.TarWriter(str(path)) as tar:
        for index in indices:
            record = reader.read(index, 0)
            members: dict[str, Any] = {
                "tokens.npy": record.tokens,
                "scale.npy": record.scale,
                "attention.npy": record.attention,
            }
            members["jpg"] = record.image  # stays bytes in either
            tar.write({"__key__": f"{index:09d}", **{k: v for k, v in members.items() if v is not None}})

    def library() -> None:
        for _ in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False).decode():
            pass

    try:
        yield library
    finally:
        path.unlink()


def _digest_file(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        hashlib.file_digest(file, xxhash.xxh3_128)


def _both_sums(path: Path) -> None:
    file, hasher, offset = Descriptor(path), xxhash.xxh3_128(), 0
    block = aligned(max(1, min(2 * BLOCK, file.size()))).data  # of all sizes the fastest for one thread
    while got := file.read_some((block,), offset):
        hasher.update(block[:got])
        crc32c(block[:got])
        offset += got


def _verify(path: Path, reader: CacheReader, repeats: int, digest: Callable[[Path], Any]) -> dict[str, Any]:
    header, missing = reader.header, set(reader.missing_shards())
    commits = [read_commit(path, header, shard) for shard in range(header.shards) if shard not in missing]
    files = [file_of(path, file) for commit in commits for file in commit.files]
    size = sum(entry.bytes for commit in commits for entry in commit.files.values())

    def bare() -> None:
        for file in files:
            digest(file)

    return _compare((bare, lambda: verify(path, "full")), repeats, size, "bytes")


def _write(config: BenchmarkCacheConfig, header: CacheHeader, data: ShardData, scratch: Path) -> dict[str, Any]:
    path, plain = scratch / "written", scratch / "plain"
    _write_all(path, header, [])
    writer = open_writer(path)
    writer.write_shard(0, data)
    commit = read_commit(path, header, 0)
    contents = {name: file_of(path, name).read_bytes() for name in commit.files}
    contents |= {f"index/{v}": bytes(32 * commit.count) for v in range(header.views) if header.store == "webdataset"}
    contents["commits/000000.json"] = commit.to_bytes()

    def bare() -> None:
        for name, content in contents.items():
            target = plain / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for folder in {(plain / name).parent for name in contents}:
            sync(folder)

    size = sum(map(len, contents.values()))
    result = _compare((bare, lambda: writer.write_shard(0, data)), config.repeats, size, "bytes")
    shutil.rmtree(path)
    shutil.rmtree(plain)
    return result


def _compare(pair: Pair, repeats: int, amount: int, unit: str) -> dict[str, Any]:
    """Time both in turn; the ratio of each round is the bare time over ours."""
    for warm in pair:
        warm()
    times = [(_seconds(pair[0]), _seconds(pair[1])) for _ in range(repeats)]
    ratios = [bare / ours for bare, ours in times]
    bare, ours = (statistics.median(side) for side in zip(*times, strict=True))
    return {
        "ratio": statistics.median(ratios),
        f"bare_{unit}_per_second": amount / bare,
        f"{unit}_per_second": amount / ours,
        "ratios": [round(ratio, 4) for ratio in ratios],
    }


def _seconds(job: Callable[[], Any]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def _header(config: BenchmarkCacheConfig, store: str) -> CacheHeader:
    flat = np.ones(config.dim, np.float32)
    return CacheHeader.model_validate(
        {
            "store": store,
            "dataset": DatasetSection(source="random", kind="random", count=config.samples, digest="none"),
            "teacher": {"name": "random", "grid": [config.grid, config.grid], "dim": config.dim},
            "preprocessing": {},
            "views": ViewSection(count=1, seed=config.seed, image_size=16 * config.grid),
            "quantiser": Quantiser("int8", 0 * flat, flat).to_json(),
            "samples_per_shard": config.samples_per_shard,
        }
    )


def _random_shard(config: BenchmarkCacheConfig, header: CacheHeader, shard: int) -> ShardData:
    random = np.random.default_rng([config.seed, shard])
    n, L = len(header.shard_range(shard)), header.tokens
    images: list[list[bytes] | None] = [[random.bytes(config.image_bytes)] for _ in range(n)]
    return ShardData(
        tokens=random.integers(-127, 128, (n, 1, L, header.dim), np.int8),
        scale=random.uniform(0.01, 0.1, (n, 1, L)).astype(np.float16),
        attention=np.full((n, 1, L), 1 / L, np.float16),
        box=np.ones((n, 1, 4), np.int32),
        hflip=np.zeros((n, 1), np.uint8),
        source_hash=random.integers(2**63, size=n).astype(np.uint64),
        keys=[f"n{shard:08d}/n{shard:08d}_{row}.JPEG" for row in range(n)],
        images=images if header.store == "webdataset" else None,
    )


def _write_all(path: Path, header: CacheHeader, shards: Iterable[ShardData]) -> None:
    create_cache(path, header)
    writer = open_writer(path)
    for shard, data in enumerate(shards):
        writer.write_shard(shard, data)


def _machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "crc32c": f"awscrt {version('awscrt')}, google-crc32c {version('google-crc32c')}",
    }
