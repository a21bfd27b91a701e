"""Records of a remote cache, each by a request of its own: what the server counts, and what is said of damage."""

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cache import CacheReader, LocalFolder, RemoteCache, create_cache, open_cache, open_writer
from pipeline.cache.remote import objects
from pipeline.errors import CacheDamage
from pipeline.forking import fork
from tests.forked import exit_code
from tests.servers import FilesServer, s3_server, upload
from tests.test_pipeline.cache.remote.test_remote import same
from tests.test_pipeline.cache.samples import make_header, make_shard

log = logging.getLogger(__name__)

LARGE = ("tokens/", "scale/", "attention/", "shards/")


def ranged(server: FilesServer, tmp_path: Path) -> RemoteCache:
    return RemoteCache(server.url, LocalFolder(tmp_path / "local", 10**9), by_range=True)


@pytest.mark.parametrize(
    ("quantiser", "attention", "dim"),
    [("int8", "mean", 384), ("int4", "heads", 384), ("int4", "mean", 192), ("float16", "none", 384)],
)
def test_requests_and_bytes_as_the_server_counts_them(
    quantiser: str, attention: str, dim: int, store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every record at random: at most one request for webdataset and two for zarr, and 1.1 times its bytes.

    The images have 41 bytes. Beside the smallest tokens (192 channels) they have 700, less than a real view's:
    with 41 bytes the headers and padding of webdataset make it 1.101.
    """
    caplog.set_level(logging.INFO, __name__)
    heads = 3 if attention == "heads" else 0
    header = make_header(
        store, quantiser_name=quantiser, attention=attention, heads=heads, grid=[14, 14], dim=dim, samples_per_shard=5
    )
    cache = tmp_path / "cache"
    create_cache(cache, header)
    for shard in range(header.shards):
        data = make_shard(header, shard)
        if dim == 192 and data.images is not None:
            data.images = [[image and image.ljust(700, b" ") for image in views] for views in data.images]
        open_writer(cache).write_shard(shard, data)
    local = open_cache(cache)
    with FilesServer(cache).running() as server:
        reader = open_cache(ranged(server, tmp_path))
        reader.load_tables()
        metadata = len(server.requests)
        content, records = 0, 0
        for index in (3, 9, 0, 7, 5, 1, 8, 2, 6, 4):
            for view in range(header.views):
                raw = local._open(index // 5, view).read(index % 5)
                assert reader.read(index, view).tokens.tobytes() == raw.tokens.tobytes()
                content += sum(memoryview(part).nbytes for part in raw.body)
                records += 1
        requests = server.requests[metadata:]
    assert all(path.startswith(LARGE) for path, _, _ in requests)  # the tables were read before, once
    sent = sum(size for _, _, size in requests)
    figures = len(requests) / records, sent / content
    log.info("%s %s, %d channels: %.2f requests a record, %.3f of its bytes", store, quantiser, dim, *figures)
    assert len(requests) / records <= (1 if store == "webdataset" else 2)
    assert sent <= 1.1 * content
    whole = [path for path, _, _ in requests if not path.startswith(("tokens/", "shards/"))]
    assert len(whole) == len(set(whole))
    assert not [path for path in (tmp_path / "local").rglob("*") if path.parent.name in ("tokens", "shards")]


def test_records_are_those_of_the_local_cache(cache: Path, server: FilesServer, tmp_path: Path) -> None:
    reader = open_cache(ranged(server, tmp_path))
    places = [(index, view) for index in reader.live_indices().tolist() for view in range(2)]
    reader.expect(places)
    assert same(reader, open_cache(cache))
    ranges = [(path, start) for path, start, _ in server.requests if path.startswith(("tokens/", "shards/"))]
    assert len(ranges) == len(set(ranges)) == len(places)


def test_expected_records_come_side_by_side(
    cache: Path, server: FilesServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = open_cache(ranged(server, tmp_path))
    barrier, read = threading.Barrier(4, timeout=30), objects.Objects.read

    def read_together(self: objects.Objects, name: str, start: int, stop: int) -> bytes:
        if name.startswith(("tokens/", "shards/")):
            barrier.wait()
        return read(self, name, start, stop)

    for index in (0, 1, 2, 3):
        reader.read(index, 0)  # what is fetched whole
    monkeypatch.setattr(objects.Objects, "read", read_together)
    reader.expect([(index, 0) for index in (0, 1, 2, 3)])
    assert [reader.read(index, 0).index for index in (0, 1, 2, 3)] == [0, 1, 2, 3]


@pytest.mark.parametrize("fault", ["flip", "truncate", "404", "500"])
def test_what_fails_on_the_way_is_fetched_once_more(
    fault: str, cache: Path, server: FilesServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def first_of_a_file(path: str, count: int) -> str | None:
        return fault if count == 0 and path.startswith(("tokens/", "shards/")) else None

    server.fault = first_of_a_file
    with caplog.at_level(logging.WARNING):
        assert same(open_cache(ranged(server, tmp_path)), open_cache(cache))
    assert ("it is fetched once more" in caplog.text) == (fault != "500")


@pytest.mark.parametrize(
    ("fault", "problem"),
    [("flip", "(checksum differs|not what was written)"), ("truncate", "it ends at byte"), ("404", "is missing")],
)
def test_damage_at_the_source_is_named_at_the_record(
    fault: str, problem: str, server: FilesServer, tmp_path: Path
) -> None:
    reader = open_cache(ranged(server, tmp_path))
    reader.read(3, 1)
    server.fault = lambda path, count: fault if path.startswith(("tokens/", "shards/")) else None
    with pytest.raises(
        CacheDamage, match=rf"damage in shard 1, sample 4, view 1: .*{problem}.* itself is damaged: mend"
    ):
        reader.read(4, 1)
    server.fault = lambda path, count: None
    assert reader.read(4, 1).index == 4


@pytest.mark.parametrize("times", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_processes_forked_while_threads_read_s3_do_not_hang(times: int, cache: Path, tmp_path: Path) -> None:
    """By ranges and by shards: each process reads all records, while two threads of its parent do."""
    local, stop, ends, differing = open_cache(cache), threading.Event(), list[int | None](), list[str]()
    with s3_server():
        upload(cache, "s3://bucket/forks")
        by_range, by_shard = (
            open_cache(RemoteCache("s3://bucket/forks", LocalFolder(tmp_path / name, 10**9), by_range=name == "ranges"))
            for name in ("ranges", "shards")
        )

        def read_on(reader: CacheReader) -> None:
            while not stop.is_set():
                reader.expect([(0, 0), (1, 1)])
                if not same(reader, local):
                    differing.append(threading.current_thread().name)

        threads = [threading.Thread(target=read_on, args=(reader,), daemon=True) for reader in (by_range, by_shard)]
        for thread in threads:
            thread.start()
        try:
            while len(ends) < times and None not in ends:
                ends.append(_end_of_fork(lambda: same(by_range, local) and same(by_shard, local)))
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)
    assert ends == [0] * times
    assert differing == []
    assert not any(thread.is_alive() for thread in threads)


def _end_of_fork(succeeds: Callable[[], bool]) -> int | None:
    """The exit code of a forked process; None: it hangs."""
    pid = fork()
    if not pid:
        try:
            os._exit(0 if succeeds() else 1)
        finally:
            os._exit(2)
    return exit_code(pid, 120)
