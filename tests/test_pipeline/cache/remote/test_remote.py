"""Caches behind a URL: what arrives, what the local folder holds, and what is said of servers that fail."""

import errno
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.cache import CacheReader, FetchAhead, LocalFolder, Mirror, RemoteCache, open_cache, open_mirror
from pipeline.cache.files import hash_file
from pipeline.cache.format.commits import read_commit, write_commit
from pipeline.cache.format.header import read_header
from pipeline.cache.remote import ahead, folder, objects
from pipeline.cache.remote import mirror as mirror_module
from pipeline.errors import CacheError, ConfigError, StorageError
from tests.servers import FilesServer
from tests.test_pipeline.cache.samples import make_cache, make_header

BIG = 10**9


def remote(server: FilesServer, tmp_path: Path, limit: int = BIG) -> RemoteCache:
    return RemoteCache(server.url, LocalFolder(tmp_path / "local", limit))


def data_of(mirror: Mirror, shard: int) -> list[str]:
    return list(mirror._large(shard))


def same(a: CacheReader, b: CacheReader) -> bool:
    assert a.live_indices().tolist() == b.live_indices().tolist()
    for index in a.live_indices().tolist():
        for view in range(a.header.views):
            left, right = a.read(index, view), b.read(index, view)
            if (left.key, left.image) != (right.key, right.image):
                return False
            for name in ("tokens", "scale", "attention", "box", "hflip", "source_hash"):
                if not np.array_equal(getattr(left, name), getattr(right, name)):
                    return False
    return True


def local_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def all_but_a_byte(server: FilesServer, tmp_path: Path) -> int:
    """A limit that holds two of the three shards, whichever."""
    mirror = open_mirror(remote(server, tmp_path))
    return mirror.metadata_size() + sum(map(mirror.size, range(3))) - 1


def test_records_are_those_of_the_local_cache(cache: Path, server: FilesServer, tmp_path: Path) -> None:
    reader = open_cache(remote(server, tmp_path))
    reader.load_tables()
    assert not [path for path, _, _ in server.requests if path in data_of(reader.shards, 0)]  # metadata alone
    assert same(reader, open_cache(cache))
    assert same(pickle.loads(pickle.dumps(reader)), open_cache(cache))


def test_each_file_is_fetched_once(cache: Path, server: FilesServer, tmp_path: Path) -> None:
    assert same(open_cache(remote(server, tmp_path)), open_cache(cache))
    assert same(open_cache(remote(server, tmp_path)), open_cache(cache))
    names = [path for path, _, _ in server.requests if path != "cache.json"]
    assert len(names) == len(set(names))


def test_a_file_that_a_power_failure_cut_is_fetched_again(cache: Path, server: FilesServer, tmp_path: Path) -> None:
    """Large files are not synced to the disk: their lengths say whether they got there."""
    mirror = open_mirror(remote(server, tmp_path))
    assert same(open_cache(remote(server, tmp_path)), open_cache(cache))
    cut = mirror.root / data_of(mirror, 1)[0]
    with cut.open("r+b") as file:
        file.truncate(10)
    before = len(server.requests)
    assert same(open_cache(remote(server, tmp_path)), open_cache(cache))
    fetched = [path for path, _, _ in server.requests[before:] if path != "cache.json"]
    assert fetched == [cut.relative_to(mirror.root).as_posix()]


def test_large_files_come_in_blocks(
    cache: Path, server: FilesServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "BLOCK", 100)
    assert same(open_cache(remote(server, tmp_path)), open_cache(cache))
    assert max(sent for path, _, sent in server.requests if path.startswith(("tokens/", "shards/"))) == 100


def test_the_folder_never_exceeds_its_limit(cache: Path, server: FilesServer, tmp_path: Path) -> None:
    opened = open_mirror(remote(server, tmp_path))
    limit = opened.metadata_size() + 2 * max(map(opened.size, range(3)))
    place = remote(server, tmp_path, limit)
    local, worst, stop = place.local.path, [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            worst[0] = max(worst[0], local_bytes(local))

    watcher = threading.Thread(target=watch)
    watcher.start()
    readers = [open_cache(place) for _ in range(3)]
    failures: list[bool] = []
    threads = [threading.Thread(target=lambda r=r: failures.append(not same(r, open_cache(cache)))) for r in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    watcher.join()
    assert failures == [False] * 3
    # Beside the files of caches: locks, which are empty, and the markers with the names of a shard's files.
    assert 0 < worst[0] <= limit + 3 * 400


def test_the_shard_wanted_longest_ago_goes_first(server: FilesServer, tmp_path: Path) -> None:
    mirror = open_mirror(remote(server, tmp_path, all_but_a_byte(server, tmp_path)))
    for second, shard in enumerate((0, 1, 0, 2)):
        with mirror.hold(shard):
            os.utime(mirror._marker(shard), (second, second))
    assert [mirror._is_whole(shard) for shard in range(3)] == [True, False, True]


def test_a_removed_shard_is_closed(server: FilesServer, tmp_path: Path) -> None:
    folder = tmp_path / server.root.name  # both stores' tests may get one tmp_path, and a reader may remain
    opened = open_mirror(remote(server, folder))
    limit = opened.metadata_size() + max(map(opened.size, range(3)))
    reader = open_cache(remote(server, folder, limit))
    for index in (0, 4, 8, 0):
        reader.read(index, 0)
    held = [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if _is_link(number)]
    assert not [name for name in held if name.startswith(str(folder)) and name.endswith("(deleted)")]


def _is_link(number: str) -> bool:
    try:
        os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return False
    return True


def test_a_limit_below_one_shard_is_one_line(
    server: FilesServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "_PATIENCE", 0.0)
    opened = open_mirror(remote(server, tmp_path))
    reader = open_cache(remote(server, tmp_path, opened.metadata_size() + 10))
    with pytest.raises(CacheError, match=r"has no room for .* within cache.local_limit=.*: give more"):
        reader.read(0, 0)


@pytest.mark.parametrize("fault", ["500", "503", "429", "cut", "stall"])
def test_failing_requests_change_nothing(
    fault: str, cache: Path, server: FilesServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_SILENCE", 0.2)
    random, failed = np.random.default_rng(0), list[str]()

    def fail(path: str, _count: int) -> str | None:
        if random.random() >= (0.02 if fault == "stall" else 0.2):
            return None
        failed.append(path)
        return fault

    server.fault = fail
    assert same(open_cache(remote(server, tmp_path)), open_cache(cache))
    assert failed


@pytest.mark.parametrize("fault", ["truncate", "flip", "404"])
def test_damage_on_the_way_is_fetched_once_more(
    fault: str, cache: Path, server: FilesServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.fault = lambda path, count: fault if count == 0 and path.startswith(("tokens/", "shards/")) else None
    with caplog.at_level(logging.WARNING):
        assert same(open_cache(remote(server, tmp_path)), open_cache(cache))
    assert "it is fetched once more" in caplog.text


@pytest.mark.parametrize(
    ("fault", "problem"),
    [("truncate", "ends at byte"), ("flip", "xxh3-128 differs"), ("404", "missing"), ("416", "ends before")],
)
def test_damage_at_the_source_is_named(fault: str, problem: str, server: FilesServer, tmp_path: Path) -> None:
    reader = open_cache(remote(server, tmp_path))
    server.fault = lambda path, count: fault if path.startswith(("tokens/", "shards/")) else None
    with pytest.raises(CacheError, match=rf"damage in shard 1: (tokens|shards)/.*{problem}.*twice.*cache-copy"):
        reader.read(4, 0)
    assert not reader.shards._is_whole(1)
    server.fault = lambda path, count: None
    assert reader.read(4, 0).index == 4


@pytest.mark.parametrize(
    ("store", "prefix"),
    [("zarr", "commits/"), ("zarr", "box/"), ("zarr", "key/"), ("webdataset", "commits/"), ("webdataset", "index/")],
)
def test_damaged_metadata_is_named(prefix: str, server: FilesServer, tmp_path: Path) -> None:
    server.fault = lambda path, count: "flip" if path.startswith(prefix) else None
    with pytest.raises(CacheError, match=rf"damage in shard 0: {prefix}"):
        open_cache(remote(server, tmp_path))


def test_a_server_that_lies_consistently_is_caught_at_the_record(store: str, tmp_path: Path) -> None:
    """Another cache's shard with commit records that fit it: every file is what is stated, and no record is."""
    header = make_header(store)
    honest = make_cache(tmp_path / "a", header)
    swapped = make_cache(tmp_path / "b", header)
    _swap_shards(swapped, header.fingerprint)
    with FilesServer(swapped).running() as server:
        reader = open_cache(remote(server, tmp_path))
        with pytest.raises(CacheError, match=r"sample 0, view 0: .*; remove .* and run again"):
            reader.read(0, 0)
    assert open_cache(honest).read(0, 0).index == 0


def _swap_shards(cache: Path, fingerprint: str) -> None:
    """Give shard 0 the files of shard 1, and a commit record that says so."""
    header = read_header(cache)
    commit = read_commit(cache, header, 0)
    files = {}
    for file in commit.files:
        other = file.replace("c.0.", "c.1.").replace("shards/000000", "shards/000001")
        other = "key/c.1" if file == "key/c.0" else "source_hash/c.1" if file == "source_hash/c.0" else other
        (cache / file).write_bytes((cache / other).read_bytes())
        files[file] = hash_file(cache / file)
    for view in range(header.views):
        index = cache / f"index/{0:06d}-{view:02d}.index"
        if index.exists():
            index.write_bytes((cache / f"index/{1:06d}-{view:02d}.index").read_bytes())
    write_commit(cache, commit.model_copy(update={"files": files}))


def test_a_server_that_stays_down_is_one_line(server: FilesServer, tmp_path: Path) -> None:
    reader = open_cache(remote(server, tmp_path))
    server.fault = lambda path, count: "500"
    with pytest.raises(StorageError, match=r"7 tries failed, the last by .*500.*: check the network") as caught:
        reader.read(0, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("status", ["401", "403"])
def test_refused_access_says_so_at_once(status: str, server: FilesServer, tmp_path: Path) -> None:
    server.fault = lambda path, count: status
    with pytest.raises(StorageError, match=r"cache\.json: permission denied: give the library credentials"):
        open_cache(remote(server, tmp_path))
    assert len(server.requests) == 1


def test_a_server_without_ranges_is_refused(
    server: FilesServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "BLOCK", 100)
    server.fault = lambda path, count: "whole"
    with pytest.raises(StorageError, match=r"choose one that knows ranges"):
        open_cache(remote(server, tmp_path)).read(0, 0)


def test_no_cache_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with (
        FilesServer(tmp_path / "empty").running() as server,
        pytest.raises(CacheError, match=r"no cache\.json: give the folder that `mrmae cache-copy` wrote"),
    ):
        open_cache(remote(server, tmp_path))


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(objects._PACKAGES, "s3", "no_such_package")
    with pytest.raises(ConfigError, match=r"s3:// needs no_such_package: pip install -e '\.\[remote\]'"):
        open_cache(RemoteCache("s3://bucket/cache", LocalFolder(tmp_path, BIG)))


def test_reasons_hold_no_signature() -> None:
    error = OSError(errno.EIO, "403 for https://host/file?X-Amz-Signature=abcdef&Expires=1")
    assert "abcdef" not in objects._reason(error)
    assert "https://host/file" in objects._reason(error)


def test_shards_are_fetched_ahead(server: FilesServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_AT_ONCE", 1)
    mirror = open_mirror(remote(server, tmp_path))
    fetcher = FetchAhead([mirror])
    try:
        fetcher.want([2, 0])
        wait_for(lambda: mirror._is_whole(2) and mirror._is_whole(0))
        assert not mirror._is_whole(1)
        names = [path for path, _, _ in server.requests]
        assert names.index(data_of(mirror, 2)[0]) < names.index(data_of(mirror, 0)[0])
        fetcher.want([1])
        wait_for(lambda: mirror._is_whole(1))
    finally:
        fetcher.close()


def test_fetching_ahead_removes_nothing_that_is_wanted(server: FilesServer, tmp_path: Path) -> None:
    mirror = open_mirror(remote(server, tmp_path, all_but_a_byte(server, tmp_path)))
    assert mirror.fetch_ahead(0, [0, 1, 2])
    assert mirror.fetch_ahead(1, [0, 1, 2])
    assert not mirror.fetch_ahead(2, [0, 1, 2])
    assert mirror.fetch_ahead(2, [1, 2])
    assert [mirror._is_whole(shard) for shard in range(3)] == [False, True, True]


def test_a_killed_process_leaves_a_folder_that_goes_on(cache: Path, server: FilesServer, tmp_path: Path) -> None:
    """Killed in the middle of a file: its reservation counts, its bytes are fetched again."""
    mirror = open_mirror(remote(server, tmp_path))
    server.fault = lambda path, count: "stall" if path == data_of(mirror, 0)[-1] and count == 0 else None
    pid = os.fork()
    if not pid:
        try:
            with mirror.hold(0):
                pass
        finally:
            os._exit(1)
    wait_for(lambda: any(path == data_of(mirror, 0)[-1] for path, _, _ in server.requests))
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    assert not mirror._is_whole(0)
    assert same(open_cache(remote(server, tmp_path)), open_cache(cache))
    assert not list((tmp_path / "local").rglob("*.partial"))


def test_processes_share_the_work(cache: Path, server: FilesServer, tmp_path: Path) -> None:
    reader = open_cache(remote(server, tmp_path))
    pids = []
    for _ in range(4):
        pid = os.fork()
        if not pid:
            try:
                os._exit(0 if same(reader, open_cache(cache)) else 1)
            finally:
                os._exit(2)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    names = [path for path, _, _ in server.requests]
    assert len(names) == len(set(names))


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_folder_that_cannot_be_written_is_one_line(server: FilesServer, tmp_path: Path) -> None:
    (tmp_path / "local").write_text("a file")
    with pytest.raises(CacheError, match=r"can't be written: a file stands where a folder is needed"):
        open_cache(remote(server, tmp_path))


def test_only_committed_shards_are_seen(cache: Path, server: FilesServer, tmp_path: Path) -> None:
    record = cache / "commits/000001.json"
    content = record.read_bytes()
    record.unlink()
    assert open_cache(remote(server, tmp_path)).missing_shards() == [1]
    record.write_bytes(content)
    assert open_cache(remote(server, tmp_path)).missing_shards() == []


def test_metadata_are_read_in_batches(
    cache: Path, server: FilesServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "_BATCH", 1)
    mirror = open_mirror(remote(server, tmp_path))
    metadata = [path for path in mirror.root.rglob("*") if path.is_file() and path.parent.name != "resident"]
    assert mirror.metadata_size() == sum(path.stat().st_size for path in metadata)
