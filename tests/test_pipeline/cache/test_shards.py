"""Shuffled reads from many more shards than stay open: right, as few system calls as records ask for, memory shared."""

import json
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from benchmarks.sparse_cache import create_sparse_cache, filled_rows
from pipeline.assembly.caches import open_caches
from pipeline.cache import CacheHeader, CacheReader, open_cache, verify
from pipeline.cache import files as cache_files
from pipeline.cache import reader as cache_reader
from pipeline.errors import CacheDamage
from tests import forked
from tests.test_pipeline.cache.samples import make_cache, make_header

ONE_VIEW = {"count": 1, "seed": 0, "image_size": 32}


def dataset_of(count: int) -> dict[str, object]:
    return {"source": "photos", "kind": "folder", "count": count, "digest": "d" * 32}


@pytest.fixture
def many(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """36 shards of 4 samples in 2 views."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return make_cache(tmp_path / "cache", make_header(store, dataset=dataset_of(144)))


def limit_files(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """As if neither limit of open files let a process have more."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (count, count))


def shuffled(reader: CacheReader) -> list[tuple[int, int]]:
    places = [(index, view) for index in reader.live_indices().tolist() for view in range(reader.header.views)]
    return [places[at] for at in np.random.default_rng(0).permutation(len(places))]


def contents(reader: CacheReader, place: tuple[int, int]) -> list[object]:
    record = reader.read(*place, keep=False)
    arrays = [None if a is None else a.tobytes() for a in (record.tokens, record.scale, record.attention)]
    return [*arrays, record.key, record.box.tolist(), record.hflip, record.source_hash, record.image]


@pytest.mark.parametrize("loaded", [False, True])
def test_records_are_right_whatever_stays_open(many: Path, monkeypatch: pytest.MonkeyPatch, loaded: bool) -> None:
    reader = open_cache(many)
    expected = {place: contents(reader, place) for place in shuffled(reader)}
    limit_files(monkeypatch, 36)  # a third or less of the shards
    monkeypatch.setattr(cache_reader, "_MAX_OPEN_VIEWS", 12)
    reader = open_cache(many)
    before = len(os.listdir("/proc/self/fd"))
    if loaded:
        reader.load_tables()
    assert {place: contents(reader, place) for place in shuffled(reader)} == expected
    assert len(os.listdir("/proc/self/fd")) - before <= 18


def test_reads_and_opens_of_a_record(many: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With three times the shards that stay open: its large arrays, nothing of the tables."""
    files_of_record = {"zarr": 3, "webdataset": 1}[store]
    limit_files(monkeypatch, 2 * files_of_record * 24)  # of 72 views
    reader = open_cache(many)
    reader.load_tables()
    counts = {"open": 0, "preadv": 0}

    def counting(name: str, call: Callable[..., int]) -> Callable[..., int]:
        def counted(*arguments: object) -> int:
            counts[name] += 1
            return call(*arguments)

        return counted

    monkeypatch.setattr(cache_files, "preadv", counting("preadv", os.preadv))
    monkeypatch.setattr(os, "open", counting("open", os.open))
    places = shuffled(reader)
    for place in places:
        reader.read(*place, keep=False)
    assert counts["preadv"] == files_of_record * len(places)
    assert len(places) * files_of_record // 2 < counts["open"] <= len(places) * files_of_record


def test_everything_stays_open_where_the_system_allows_it(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (20, 5000))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    reader = open_cache(many)
    reader.load_tables()
    places = shuffled(reader)
    for place in places:
        reader.read(*place)
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened again"))
    for place in places:
        reader.read(*place)
    assert before >= 72
    assert 144 <= asked[0][0] <= 432
    assert asked[0][1] == 5000


@pytest.mark.parametrize(
    ("limits", "count", "expected"),
    [
        ((1024, 4096), 3000, 3000),
        ((1024, 4096), 9000, 4096),
        ((1024, 10**9), 10**8, 1 << 16),
        ((2048, 4096), 100, 2048),
        ((1024, resource.RLIM_INFINITY), 3000, 3000),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 3000, 1 << 16),
    ],
)
def test_the_limit_of_open_files(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], count: int, expected: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: None)
    assert cache_files.allow_files(count) == expected


def test_a_sandbox_that_forbids_raising_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_: int, limits: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", forbidden)
    assert cache_files.allow_files(3000) == 1024


def test_a_damaged_table_is_named_and_spoils_no_other_shard(many: Path, store: str) -> None:
    file = many / ("index/000007-01.index" if store == "webdataset" else "hflip/c.7.1")
    content = bytearray(file.read_bytes())
    content[2] ^= 8
    file.write_bytes(content)
    reader = open_cache(many)
    message = r"damage in shard 7, sample 28, view 1: .*crc32c differs; run `mrmae verify-cache .* --repair`"
    with pytest.raises(CacheDamage, match=message):
        reader.load_tables()
    sound = [place for place in shuffled(reader) if place[0] // 4 != 7 or place[1] == 0]
    intact = open_cache(many)
    assert [contents(reader, place) for place in sound] == [contents(intact, place) for place in sound]
    with pytest.raises(CacheDamage, match=r"damage in shard 7, sample 30, view 1: .*crc32c differs"):
        reader.read(30, 1)
    assert {finding.shard for finding in verify(many, "full").findings} == {7}
    with pytest.raises(CacheDamage, match="damage in shard 7, sample 28, view 1"):
        open_caches({"teacher": many})


def test_training_opens_caches_with_their_tables(many: Path) -> None:
    (reader,) = open_caches({"": many}).values()
    tables = [reader._tables.get(shard, view) for shard in range(36) for view in (None, 0, 1)]
    assert all(table is not None and table.readonly for table in tables)


def private_dirty() -> int:
    """Bytes of memory that this process shares with no other and has written to."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


def _worker(reader: CacheReader, places: list[int], answer: Connection) -> None:
    for index in places[:4]:
        reader.read(index, 0, keep=False)
    before = private_dirty()
    for index in places:
        reader.read(index, 0, keep=False)
    answer.send(private_dirty() - before)


def growth_of_workers(path: Path) -> list[int]:
    """Private bytes that two workers, forked with all tables in memory, take while each reads every record."""
    reader = open_cache(path)
    reader.load_tables()
    places = [1024 * shard + row for shard in range(200) for row in filled_rows(reader.header, shard, 8).tolist()]
    context = multiprocessing.get_context("fork")
    grown = []
    for seed in range(2):
        mine, theirs = context.Pipe()
        order = np.random.default_rng(seed).permutation(places).tolist()
        worker = context.Process(target=_worker, args=(reader, order, theirs))
        worker.start()
        assert mine.poll(60)
        grown.append(mine.recv())
        worker.join()
    return grown


GROWTH = """
import json, sys
from pathlib import Path
from tests.test_pipeline.cache.test_shards import growth_of_workers
print(json.dumps(growth_of_workers(Path(sys.argv[1]))))
"""


@pytest.mark.parametrize("format_", ["zarr", "webdataset"])
def test_forked_workers_share_the_tables(tmp_path: Path, format_: str) -> None:
    """200 shards of 1,024 samples: 13 MB of tables (6 of indices); a worker takes its open files and little more."""
    header = make_header(format_, dataset=dataset_of(204_800), samples_per_shard=1024, views=ONE_VIEW)
    create_sparse_cache(tmp_path, header, [8] * 200, image_bytes=100)
    # In a process of its own: a worker copies each page of its parent in which it counts a reference.
    done = forked.run([sys.executable, "-c", GROWTH, str(tmp_path)], text=True)
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout)) < 2_000_000


def memory_of_loading(cache: Path) -> tuple[int, int]:
    """Bytes of this process that loading a cache's tables takes at most, and that it keeps."""
    reader = open_cache(cache)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    reader.load_tables()
    return _status("VmHWM") - before, _status("VmRSS") - before


LOADING = GROWTH.replace("growth_of_workers", "memory_of_loading")


def test_loading_takes_little_more_memory_than_it_keeps(tmp_path: Path) -> None:
    """Peak above what is kept; zarr, whose tables are the larger ones."""
    header: CacheHeader = make_header(
        "zarr", dataset=dataset_of(409_600), samples_per_shard=1024, views=ONE_VIEW, dim=2, grid=[1, 1]
    )
    create_sparse_cache(tmp_path, header, [1] * 400)
    # In a process of its own: here the tables may lie in memory that earlier tests have freed, which counts already.
    done = forked.run([sys.executable, "-c", LOADING, str(tmp_path)], text=True)
    assert done.returncode == 0, done.stderr
    peak, kept = json.loads(done.stdout)
    assert 20_000_000 < kept < 50_000_000  # about 65 bytes a sample
    assert peak - kept < 8_000_000


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
