"""Sizes that matter: millions of samples, thousands of shards, few descriptors, little memory."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pipeline.cache import CacheHeader, create_cache, open_cache, open_writer
from pipeline.cache.files import FileEntry
from pipeline.cache.format.commits import Commit, write_commit
from pipeline.cache.writer import store_of
from tests import forked
from tests.test_pipeline.cache.samples import make_header, make_shard

ONE_VIEW = {"count": 1, "seed": 0, "image_size": 32}


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of files that nobody needs after a power cut."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def dataset_of(count: int) -> dict[str, object]:
    return {"source": "photos", "kind": "folder", "count": count, "digest": "d" * 32}


def run_python(code: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.usefixtures("no_fsync")
def test_a_cache_of_imagenet_size_opens_in_two_seconds(tmp_path: Path, store: str) -> None:
    header = make_header(store, dataset=dataset_of(1_281_167), samples_per_shard=1024, views=ONE_VIEW)
    create_cache(tmp_path, header)
    layout = store_of(tmp_path, header)
    for shard in range(header.shards):
        files = {file: FileEntry(bytes=154_000_000, xxh3_128="0" * 32) for file in layout.files(shard)}
        fields = {"shard": shard, "fingerprint": header.fingerprint, "count": len(header.shard_range(shard))}
        write_commit(tmp_path, Commit(**fields, files=files, tombstones=[], fidelity={}, times={}))
    started = time.perf_counter()
    reader = open_cache(tmp_path)
    assert len(reader.live_indices()) == len(reader) == 1_281_167
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("shards", [600, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("no_fsync")
def test_more_shards_than_256_descriptors(tmp_path: Path, store: str, shards: int) -> None:
    header = make_header(store, dataset=dataset_of(shards), samples_per_shard=1, views=ONE_VIEW)
    create_cache(tmp_path, header)
    writer = open_writer(tmp_path)
    for shard in range(shards):
        writer.write_shard(shard, make_shard(header, shard))
    code = """
        import resource, sys
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        from pathlib import Path
        from pipeline.cache import open_cache
        reader = open_cache(Path(sys.argv[1]))
        for index in range(0, len(reader), 3):
            reader.read(index, 0)
        for index in range(len(reader)):
            reader.read(index, 0)
        print(len(reader))
    """
    done = forked.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], text=True)
    assert done.stdout.strip() == str(shards), done.stderr


MEMORY = """
    import sys
    from pathlib import Path
    from pipeline.cache import open_cache, verify

    def anonymous():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024

    path = Path(sys.argv[1])
    reader = open_cache(path)
    for index in range(0, len(reader), max(1, len(reader) // 10_000)):
        reader.read(index, 0)
    after_reading = anonymous()
    assert verify(path, "full").sound
    print(after_reading, anonymous())
"""


def small_header(store: str, count: int) -> CacheHeader:
    return make_header(store, dataset=dataset_of(count), samples_per_shard=1000, views=ONE_VIEW, dim=2, grid=[1, 1])


@pytest.mark.slow
@pytest.mark.usefixtures("no_fsync")
def test_memory_is_flat_from_ten_thousand_to_a_million_records(tmp_path: Path, store: str) -> None:
    """Anonymous memory of reader and verifier, in MiB; the records are tiny, the tables those of a real cache."""
    used = []
    for count in (10_000, 1_000_000):
        header = small_header(store, count)
        path = tmp_path / str(count)
        create_cache(path, header)
        writer = open_writer(path)
        for shard in range(header.shards):
            writer.write_shard(shard, make_shard(header, shard))
        used.append([int(figure) for figure in run_python(MEMORY, str(path)).split()])
    (read_few, verified_few), (read_many, verified_many) = used
    assert read_many - read_few < 64
    assert verified_many - verified_few < 96
