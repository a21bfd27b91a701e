"""Caches on the Hugging Face hub and in Google Cloud Storage, through their libraries, from servers on the loopback."""

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cache import FetchAhead, LocalFolder, RemoteCache, open_cache, open_mirror
from pipeline.cache.check.remote import verify_remote
from pipeline.cache.format.header import read_header
from pipeline.cache.remote.copying import Copying, Folder
from pipeline.cache.remote.objects import Objects
from pipeline.errors import CacheError
from tests.hubs import google_storage, hub
from tests.servers import FilesServer
from tests.test_pipeline.cache.remote.test_remote import same


@pytest.fixture(params=["hf", "gs"])
def place(request: pytest.FixtureRequest, cache: Path) -> Iterator[tuple[FilesServer, str]]:
    """A server, and the URL of the cache there."""
    if request.param == "hf":
        with hub(cache.parent) as server:
            yield server, f"hf://datasets/owner/name/{cache.name}"
    else:
        if importlib.util.find_spec("gcsfs") is None:
            pytest.skip("gs:// needs gcsfs: pip install -e '.[dev]'")
        with google_storage(cache.parent) as server:
            yield server, f"gs://bucket/{cache.name}"


@pytest.mark.parametrize("by_range", [False, True])
def test_records_are_those_of_the_local_cache(
    by_range: bool, place: tuple[FilesServer, str], cache: Path, tmp_path: Path
) -> None:
    server, url = place
    reader = open_cache(RemoteCache(url, LocalFolder(tmp_path / "local", 10**9), by_range))
    assert same(reader, open_cache(cache))
    sizes = {path: size for path, _, size in server.requests if "/tokens/c" in path or "/shards/" in path}
    parts = [size < (cache.parent / path).stat().st_size for path, size in sizes.items()]
    assert parts
    assert all(parts) if by_range else not any(parts)


def test_shards_are_fetched_ahead(place: tuple[FilesServer, str], tmp_path: Path) -> None:
    mirror = open_mirror(RemoteCache(place[1], LocalFolder(tmp_path / "local", 10**9)))
    fetcher = FetchAhead([mirror])
    try:
        fetcher.want([1])
        deadline = time.monotonic() + 60
        while not mirror._is_whole(1):
            assert time.monotonic() < deadline, "nothing was fetched"
            time.sleep(0.01)
    finally:
        fetcher.close()


@pytest.mark.parametrize("level", ["quick", "full"])
def test_a_cache_is_verified(level: str, place: tuple[FilesServer, str], cache: Path, tmp_path: Path) -> None:
    server, url = place
    assert verify_remote(url, tmp_path / "scratch", level).sound
    bad = "tokens/c.1.0.0.0" if (cache / "tokens").is_dir() else "shards/000001-00.tar"
    server.fault = lambda path, count: "flip" if path.endswith(bad) else None
    report = verify_remote(url, tmp_path / "scratch", level)
    found = {finding.file for finding in report.findings if finding.kind == "file"}
    assert found == (set() if level == "quick" else {bad})


@pytest.mark.parametrize("place", ["gs"], indirect=True)
def test_a_bucket_takes_a_cache(place: tuple[FilesServer, str], cache: Path, tmp_path: Path) -> None:
    """Twice: the second copy replaces a damaged file."""
    target = Objects(f"{place[1]}-copied")
    copying = Copying(Folder(cache), target, read_header(cache), full=True)
    copying.open_target()
    copied = [copying.copy(shard) for shard in range(3)]
    assert all(outcome and outcome[0] for outcome in copied)
    root = cache.with_name(f"{cache.name}-copied")
    names = sorted(path.relative_to(cache) for path in cache.rglob("*") if path.is_file())
    assert sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file()) == names
    assert [name for name in names if (root / name).read_bytes() != (cache / name).read_bytes()] == []
    damaged = next(path for path in root.rglob("*") if path.name in ("c.1.0.0.0", "000001-00.tar"))
    damaged.write_bytes(bytes(damaged.stat().st_size))
    assert [outcome[0] > 0 for shard in range(3) if (outcome := copying.copy(shard))] == [False, True, False]
    assert same(open_cache(RemoteCache(target.url, LocalFolder(tmp_path / "local", 10**9))), open_cache(cache))


def test_no_cache_there_is_one_line(place: tuple[FilesServer, str], tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"nothing: no cache\.json: give the folder"):
        open_cache(RemoteCache(place[1] + "/nothing", LocalFolder(tmp_path / "local", 10**9)))
