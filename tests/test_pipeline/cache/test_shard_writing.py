"""Shards written side by side, in memory that is used again: the same bytes, bounded, and no error is lost."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cache import CacheWriter, ShardBuffers, ShardData, ShardWriting, create_cache, open_cache, open_writer
from pipeline.errors import CacheError
from tests.test_pipeline.cache.samples import STORES, make_cache, make_header, make_shard

SAMPLES = 38  # 4 a shard, the last shard shorter
LOST = {5: "damaged", 13: "damaged", 37: "damaged"}


def header_of(kind: str, **changes: Any) -> Any:
    return make_header(kind, dataset={"source": "x", "kind": "folder", "count": SAMPLES, "digest": "d" * 32}, **changes)


def filled(buffers: ShardBuffers, whole: ShardData) -> ShardData:
    """The same shard in arrays of `buffers`, as extraction fills them: rows of tombstones stay as they were."""
    arrays = buffers.take(len(whole.keys))
    first = int(whole.box[0, 0, 0])
    rows = [row for row in range(len(whole.keys)) if first + row not in whole.tombstones]
    for array, content in zip(arrays, (whole.tokens, whole.scale, whole.attention), strict=True):
        if array is not None and content is not None:
            array[rows] = content[rows]
    whole.tokens, whole.scale, whole.attention = arrays
    return whole


def content(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("kind", STORES)
def test_used_memory_leaves_no_trace(kind: str, tmp_path: Path) -> None:
    header = header_of(kind, attention="heads", heads=2)
    expected = content(make_cache(tmp_path / "expected", header, LOST))
    create_cache(tmp_path / "cache", header)
    places = set()
    with ShardWriting([open_writer(tmp_path / "cache")]) as writing:
        dirty = writing.buffers[0].take(4)
        for array in dirty:
            if array is not None:
                array.view(np.uint8)[...] = 0x55
        first = make_shard(header, 0)
        first.tokens, first.scale, first.attention = dirty
        writing.buffers[0].give_back(first)
        for shard in range(header.shards):
            data = filled(writing.buffers[0], make_shard(header, shard, LOST))
            places.add(data.tokens.ctypes.data)
            writing.submit(shard, [data])
    assert content(tmp_path / "cache") == expected
    assert len(places) <= 3 < header.shards


def test_two_shards_are_written_at_once_and_no_third(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = header_of("zarr")
    create_cache(tmp_path / "cache", header)
    both, at_work, most = threading.Barrier(2), [0], []
    write = CacheWriter.write_shard

    def meet(self: CacheWriter, shard: int, data: ShardData) -> None:
        at_work[0] += 1
        most.append(at_work[0])
        if shard < 2:
            both.wait(30)  # broken, and so an error, unless another shard is on its way
        write(self, shard, data)
        at_work[0] -= 1

    monkeypatch.setattr(CacheWriter, "write_shard", meet)
    with ShardWriting([open_writer(tmp_path / "cache")]) as writing:
        for shard in range(header.shards):
            writing.submit(shard, [make_shard(header, shard)])
    assert max(most) == 2
    assert open_cache(tmp_path / "cache").missing_shards() == []


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_an_error_of_either_writer_is_met_at_once_and_the_other_shard_comes_out_whole(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = header_of(store)
    create_cache(tmp_path / "cache", header)
    failed, noticed, write = threading.Event(), threading.Event(), CacheWriter.write_shard

    def meet(self: CacheWriter, shard: int, data: ShardData) -> None:
        if shard == 1:
            failed.set()
            raise CacheError("the disk is full")
        noticed.wait(30)
        write(self, shard, data)

    monkeypatch.setattr(CacheWriter, "write_shard", meet)

    def extract() -> None:
        with ShardWriting([open_writer(tmp_path / "cache")]) as writing:
            for shard in range(2):
                writing.submit(shard, [make_shard(header, shard)])
            failed.wait(30)
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                try:
                    writing.check()
                finally:
                    noticed.set()

    with pytest.raises(CacheError, match="the disk is full"):
        extract()
    assert open_cache(tmp_path / "cache").missing_shards() == [1, *range(2, header.shards)]
    assert not list((tmp_path / "cache").rglob("*.partial"))
    monkeypatch.undo()
    writer = open_writer(tmp_path / "cache")
    for shard in range(1, header.shards):
        writer.write_shard(shard, make_shard(header, shard))
    assert content(tmp_path / "cache") == content(make_cache(tmp_path / "expected", header))


def test_the_last_error_is_met_on_leaving(tmp_path: Path) -> None:
    header = header_of("zarr")
    create_cache(tmp_path / "cache", header)
    data = make_shard(header, 0)
    data.keys = data.keys[1:]
    with pytest.raises(CacheError, match="3 keys"), ShardWriting([open_writer(tmp_path / "cache")]) as writing:
        writing.submit(0, [data])
    assert 0 in open_cache(tmp_path / "cache").missing_shards()
