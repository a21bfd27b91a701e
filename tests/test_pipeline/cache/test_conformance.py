"""One suite that every store passes: what is written is what is read, whole or not at all."""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import signal
import sys
import time
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from pipeline.cache import (
    CacheHeader,
    Record,
    create_cache,
    match_header,
    open_cache,
    open_writer,
    output_at,
    read_header,
    verify,
)
from pipeline.cache import files as cache_files
from pipeline.cache.format.header import canonical
from pipeline.errors import CacheDamage, CacheError
from pipeline.files import hash_source
from tests import forked
from tests.test_pipeline.cache.samples import (
    LAYOUTS,
    STORES,
    SUMMARIES,
    SUMMARY_SCALE,
    attention_of,
    float_summary,
    float_tokens,
    key_of,
    make_cache,
    make_header,
    make_shard,
    source_bytes,
)


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a cache, times in commit records aside."""
    found = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return {
        name: re.sub(rb'"times":\{[^}]*\}|"digest":"\w+"', b"", b) if "commits" in name else b
        for name, b in found.items()
    }


def check_everything(path: Path, header: CacheHeader) -> None:
    reader = open_cache(path)
    for index in reader.live_indices().tolist():
        for view in range(header.views):
            record = reader.read(index, view)
            stored, scale = header.quantiser.quantise(float_tokens(header, index, view))
            np.testing.assert_array_equal(record.tokens, stored.numpy())
            assert record.tokens.dtype == header.quantiser.dtype
            check_summary(header, record)
            if scale is None:
                assert record.scale is None
            else:
                np.testing.assert_array_equal(record.scale, scale.numpy())
            expected = attention_of(header, index, view)
            if expected is None:
                assert record.attention is None
            else:
                np.testing.assert_array_equal(record.attention, expected.astype(np.float16))
            assert record.box.tolist() == [index, view, index + 1, view + 1]
            assert record.hflip == bool((index + view) % 2)
            assert record.key == key_of(index)
            assert record.source_hash == hash_source(source_bytes(index))
            image = b"\xff\xd8" + source_bytes(index) + bytes([view])
            assert record.image == (image if reader.stores_images else None)


def check_summary(header: CacheHeader, record: Record) -> None:
    if header.summary is None:
        assert record.summary is record.summary_scale is None
        return
    stored, scale = header.summary_quantiser.quantise(float_summary(header, record.index, record.view))
    np.testing.assert_array_equal(record.summary, stored.numpy())
    np.testing.assert_array_equal(record.summary_scale, None if scale is None else scale.numpy())


def test_round_trip(cache: Path, store: str) -> None:
    check_everything(cache, make_header(store))


@pytest.mark.parametrize(("attention", "quantiser", "summary"), LAYOUTS)
def test_round_trip_of_every_layout(
    tmp_path: Path, store: str, attention: str, quantiser: str, summary: str | None
) -> None:
    header = make_header(
        store, quantiser_name=quantiser, attention=attention, heads=3, dim=6, grid=[3, 1], summary=summary
    )
    check_everything(make_cache(tmp_path / "cache", header), header)


def test_one_view_and_a_shard_larger_than_the_dataset(tmp_path: Path, store: str) -> None:
    header = make_header(store, samples_per_shard=64, views={"count": 1, "seed": 0, "image_size": 32})
    check_everything(make_cache(tmp_path / "cache", header), header)


def test_dequantised_tokens_are_the_teachers(cache: Path, store: str) -> None:
    record = open_cache(cache).read(7, 0, dequantise=True)
    assert record.tokens.dtype == np.float32
    expected = float_tokens(make_header(store), 7, 0).numpy()
    np.testing.assert_allclose(record.tokens, expected, atol=0.05)


def test_a_dequantised_summary_is_the_teachers(tmp_path: Path, store: str) -> None:
    """Also where an int8 of the patches' statistics would be too coarse: they are a fiftieth of the class token's."""
    header = make_header(store, summary="class")
    record = open_cache(make_cache(tmp_path / "cache", header)).read(7, 0, dequantise=True)
    np.testing.assert_allclose(record.summary, float_summary(header, 7, 0).numpy(), atol=0.05 * SUMMARY_SCALE)
    np.testing.assert_allclose(record.tokens, float_tokens(header, 7, 0).numpy(), atol=0.05)


def test_only_a_cache_with_a_summary_has_version_2(tmp_path: Path, cache: Path) -> None:
    """Caches without one keep the bytes that earlier versions read: no new key, version 1."""
    fields = json.loads((cache / "cache.json").read_bytes())
    assert fields["version"] == 1
    assert "summary" not in fields
    header = make_header("zarr", summary="class")
    assert header.to_json()["version"] == 2
    assert CacheHeader.from_bytes(header.to_bytes()) == header
    for changes, problem in (
        ({"version": 1}, "version 1 doesn't fit what the cache holds"),
        ({"version": 3}, "version: must be 1 or 2"),
        ({"summary": "pooled"}, "summary: must be 'class'"),
        ({"colour": "blue"}, "colour: is unknown"),
    ):
        (tmp_path / "cache.json").write_text(json.dumps(header.to_json() | changes, sort_keys=True, indent=1) + "\n")
        with pytest.raises(CacheDamage, match=problem) as refused:
            read_header(tmp_path)
        assert len(str(refused.value).splitlines()) == 1


def test_a_summary_needs_statistics_of_its_own() -> None:
    plain = make_header().quantiser_state
    with pytest.raises(ValueError, match=r"quantiser.summary_mean has 0 channels, not 8"):
        make_header(summary="class", quantiser=plain)


def test_a_summary_that_is_wanted_or_not_names_the_difference() -> None:
    present = {summary: make_header(summary=summary) for summary in SUMMARIES}
    wishes = {summary: make_header(summary=summary, quantiser={"name": "int8"}) for summary in SUMMARIES}
    for summary in SUMMARIES:
        match_header(Path("there"), present[summary], wishes[summary])
    with pytest.raises(CacheError, match="summary is absent there, class here; choose another folder"):
        match_header(Path("there"), present[None], wishes["class"])
    with pytest.raises(CacheError, match="summary is class there, absent here; choose another folder"):
        match_header(Path("there"), present["class"], wishes[None])


@pytest.mark.parametrize("store", STORES)
def test_arrays_can_be_written_to(cache: Path) -> None:
    """torch.from_numpy warns of arrays that can't."""
    record = open_cache(cache).read(0, 0)
    assert record.tokens.flags.writeable
    assert record.scale is not None
    assert record.scale.flags.writeable


def test_tombstones_are_kept_out(cache: Path) -> None:
    reader = open_cache(cache)
    assert len(reader) == 10
    assert reader.tombstones == {5: "cannot identify image file"}
    assert reader.live_indices().tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    with pytest.raises(CacheError, match="sample 5 is a tombstone"):
        reader.read(5, 0)


@pytest.mark.parametrize("place", [(-1, 0), (10, 0), (0, 2), (0, -1)])
def test_places_outside_are_refused(cache: Path, place: tuple[int, int]) -> None:
    with pytest.raises(CacheError, match="10 samples with 2 views"):
        open_cache(cache).read(*place)


def test_an_unfinished_cache_reads_what_is_committed(tmp_path: Path, store: str) -> None:
    header = make_header(store)
    create_cache(tmp_path, header)
    writer = open_writer(tmp_path)
    assert not writer.is_committed(1)
    writer.write_shard(1, make_shard(header, 1))
    assert writer.is_committed(1)
    reader = open_cache(tmp_path)
    assert reader.missing_shards() == [0, 2]
    assert reader.live_indices().tolist() == [4, 5, 6, 7]
    reader.read(4, 1)
    with pytest.raises(CacheError, match=r"shard 0 of .* is not extracted yet"):
        reader.read(0, 0)


def test_a_reader_pickles_small(cache: Path) -> None:
    reader = open_cache(cache)
    reader.read(0, 0)
    data = pickle.dumps(reader)
    assert len(data) < 4096
    np.testing.assert_array_equal(pickle.loads(data).read(9, 1).tokens, reader.read(9, 1).tokens)


def test_few_files_stay_open(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (2, 2))
    reader = open_cache(cache)
    before = len(os.listdir("/proc/self/fd"))
    for index in reader.live_indices().tolist():
        for view in (0, 1):
            reader.read(index, view)
    assert len(os.listdir("/proc/self/fd")) - before <= 3


def test_the_order_of_writing_leaves_no_trace(tmp_path: Path, store: str) -> None:
    header = make_header(store)
    forward = make_cache(tmp_path / "a", header, {5: "bad"})
    create_cache(tmp_path / "b", header)
    for shard in (2, 0, 1, 0):
        data = make_shard(header, shard, {5: "bad"})
        if shard == 1:
            data.tokens[1] = 77  # what a tombstone's row holds doesn't matter
        data.times = {"seconds": shard}
        open_writer(tmp_path / "b").write_shard(shard, data)
    assert contents(forward) == contents(tmp_path / "b")


def test_keys_of_any_text_survive(tmp_path: Path, store: str) -> None:
    header = make_header(store)
    create_cache(tmp_path, header)
    keys = ["", "a" * 300, "plain.jpg", "雪/☃\n"]
    data = make_shard(header, 0)
    data.keys = keys
    open_writer(tmp_path).write_shard(0, data)
    reader = open_cache(tmp_path)
    assert [reader.read(i, 1).key for i in range(4)] == keys


@pytest.mark.parametrize("key", ["\udcff.jpg", "a\0b"])
def test_keys_that_are_no_text_are_refused(tmp_path: Path, store: str, key: str) -> None:
    header = make_header(store)
    create_cache(tmp_path, header)
    data = make_shard(header, 0)
    data.keys[2] = key
    with pytest.raises(CacheError, match=r"sample 2: .* rename the file"):
        open_writer(tmp_path).write_shard(0, data)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("field", ["tokens", "scale", "attention", "box", "hflip", "source_hash", "keys"])
def test_data_that_does_not_fit_is_refused(tmp_path: Path, store: str, field: str) -> None:
    header = make_header(store)
    create_cache(tmp_path, header)
    data = make_shard(header, 0)
    setattr(data, field, getattr(data, field)[:3])
    with pytest.raises(CacheError, match=field):
        open_writer(tmp_path).write_shard(0, data)
    assert not open_writer(tmp_path).is_committed(0)


def test_a_shard_without_the_summary_row_is_refused(tmp_path: Path, store: str) -> None:
    header = make_header(store, summary="class")
    create_cache(tmp_path, header)
    with pytest.raises(CacheError, match=r"tokens is int8 \(4, 2, 6, 8\), this cache wants int8 \(4, 2, 7, 8\)"):
        open_writer(tmp_path).write_shard(0, make_shard(make_header(store), 0))


def test_creating_twice_is_accepted_wherever_the_images_lie(cache: Path, store: str) -> None:
    header = make_header(store)
    moved = header.dataset.model_copy(update={"source": "elsewhere"})
    assert not create_cache(cache, header)
    assert not create_cache(cache, header.model_copy(update={"dataset": moved}))
    assert read_header(cache).dataset.source == "photos"


def test_creating_another_cache_there_names_the_difference(cache: Path, store: str) -> None:
    other = make_header(store, preprocessing={"mean": [0.5, 0.5, 0.5], "resize": "nearest"})
    with pytest.raises(CacheError, match=r"preprocessing\.resize is bicubic there, nearest here; choose"):
        create_cache(cache, other)


@pytest.mark.parametrize("store", STORES)
def test_a_wish_without_statistics_matches_and_is_not_created(cache: Path, store: str, tmp_path: Path) -> None:
    wish = make_header(store, quantiser={"name": "int8"})
    for name in ("int8", "int4", "codes"):
        with pytest.raises(CacheError, match=f"the {name} quantiser has no channel statistics: calibrate"):
            create_cache(tmp_path / "new", make_header(store, quantiser={"name": name}))
    match_header(cache, read_header(cache), wish)
    with pytest.raises(CacheError, match=r"quantiser\.name is int8 there, float16 here"):
        match_header(cache, read_header(cache), make_header(store, quantiser={"name": "float16"}))


def test_a_folder_of_other_things_is_refused(tmp_path: Path, store: str) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CacheError, match=r"not empty \(thesis.tex\)"):
        create_cache(tmp_path, make_header(store))


def _create(path: Path, store: str, results: "multiprocessing.Queue[bool]") -> None:
    results.put(create_cache(path, make_header(store)))


def test_of_racing_processes_one_creates(tmp_path: Path, store: str) -> None:
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[bool] = context.Queue()
    racers = [context.Process(target=_create, args=(tmp_path / "cache", store, results)) for _ in range(6)]
    for racer in racers:
        racer.start()
    created = [results.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    assert sorted(created) == [False] * 5 + [True]
    assert output_at(tmp_path / "cache", tmp_path).wait(timeout=1) == make_header(store)


def test_waiting_ends(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"no cache.json after 0 s"):
        output_at(tmp_path, tmp_path).wait(timeout=0.2)


def test_no_cache_is_one_clear_line(tmp_path: Path) -> None:
    for attempt in (open_cache, open_writer, read_header):
        with pytest.raises(CacheError, match=r"no cache.json: give the folder"):
            attempt(tmp_path)


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_disk_that_refuses_is_one_clear_line(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch, number: int, line: str
) -> None:
    header = make_header(store)
    create_cache(tmp_path / "cache", header)

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CacheError, match=line) as caught:
        open_writer(tmp_path / "cache").write_shard(0, make_shard(header, 0))
    assert "\n" not in str(caught.value)
    with pytest.raises(CacheError, match=line):
        create_cache(tmp_path / "other", header)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.partial"))
    assert open_cache(tmp_path / "cache").missing_shards() == [0, 1, 2]
    open_writer(tmp_path / "cache").write_shard(0, make_shard(header, 0))


def test_a_file_in_the_way_is_one_clear_line(tmp_path: Path, store: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="a file stands where a folder is needed"):
        create_cache(tmp_path / "file" / "cache", make_header(store))


WRITER = """
import sys
from pathlib import Path
from pipeline.cache import open_writer
from tests.test_pipeline.cache.samples import make_shard
writer = open_writer(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    for shard in range(writer.header.shards):
        if not writer.is_committed(shard):
            writer.clean_partial(shard)
            writer.write_shard(shard, make_shard(writer.header, shard, {5: "bad"}))
    for shard in range(writer.header.shards):
        writer.withdraw(shard)
"""


@pytest.mark.parametrize("kind", [{"summary": "class"}, {"quantiser_name": "codes"}], ids=["summary", "codes"])
def test_a_killed_writer_leaves_nothing_that_looks_finished(tmp_path: Path, store: str, kind: dict[str, str]) -> None:
    """Killed anywhere in a loop of writing and withdrawing, every shard is whole or not there."""
    header = make_header(store, **kind)
    expected = contents(make_cache(tmp_path / "whole", header, {5: "bad"}))
    create_cache(tmp_path / "cache", header)
    command = [sys.executable, "-c", WRITER, str(tmp_path / "cache")]
    random = np.random.default_rng(1)
    for _ in range(3):
        ready, write = os.pipe()
        process = forked.Popen(command, stdout=write)
        os.close(write)
        with open(ready) as output:
            assert output.readline() == "ready\n"
        time.sleep(random.uniform(0.0, 0.15))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        reader = open_cache(tmp_path / "cache")
        for index in reader.live_indices().tolist():
            reader.read(index, 0)
            reader.read(index, 1)
    writer = open_writer(tmp_path / "cache")
    for shard in range(header.shards):
        if not writer.is_committed(shard):
            writer.clean_partial(shard)
            writer.write_shard(shard, make_shard(header, shard, {5: "bad"}))
    assert contents(tmp_path / "cache") == expected


def test_no_partial_file_of_a_shard_is_forgotten(cache: Path) -> None:
    """Whatever file of shard 1 a writer was at when it was killed."""
    ours = [f for f in cache.rglob("*") if f.name.startswith(("c.1", "000001"))]
    for file in ours:
        file.with_name(f".{file.name}.00ff.partial").write_bytes(b"half")
    writer = open_writer(cache)
    writer.withdraw(1)
    writer.clean_partial(1)
    assert not list(cache.rglob("*.partial"))


def test_partial_files_go_when_nobody_writes_them(cache: Path, store: str) -> None:
    name = ".c.0.0.0.1234.partial" if store == "zarr" else ".000000-00.tar.1234.partial"
    partial = cache / ("attention" if store == "zarr" else "shards") / name
    partial.write_bytes(b"half")
    writer = open_writer(cache)
    writer.clean_partial(0)  # committed: a repair may be at work
    assert partial.exists()
    writer.withdraw(0)
    with partial.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer.clean_partial(0)
        assert partial.exists()
    writer.clean_partial(0)
    assert not partial.exists()


def test_a_read_that_the_kernel_cuts_short_goes_on(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hesitant(descriptor: int, buffers: tuple[memoryview], offset: int) -> int:
        return os.preadv(descriptor, [memoryview(buffers[0]).cast("B")[:5]], offset)

    expected = open_cache(cache).read(2, 1).tokens
    monkeypatch.setattr(cache_files, "preadv", hesitant)
    np.testing.assert_array_equal(open_cache(cache).read(2, 1).tokens, expected)


def test_damage_names_shard_sample_view_and_remedy(cache: Path, store: str) -> None:
    target = cache / ("tokens/c.1.1.0.0" if store == "zarr" else "shards/000001-01.tar")
    content = bytearray(target.read_bytes())
    reader = open_cache(cache)
    tokens = reader.read(6, 1).tokens.tobytes()
    content[content.index(tokens)] ^= 4
    target.write_bytes(content)
    message = r"damage in shard 1, sample 6, view 1: .*; run `mrmae verify-cache .* --repair`"
    with pytest.raises(CacheDamage, match=message):
        open_cache(cache).read(6, 1)
    open_cache(cache).read(7, 1)


def test_compressed_tokens_of_earlier_versions_are_refused(cache: Path) -> None:
    """The fingerprint is right: such a cache is whole, and this version can't read it."""
    fields = json.loads((cache / "cache.json").read_bytes())
    fields["compression"] = {"id": "blosc", "cname": "zstd", "clevel": 5, "shuffle": 1}
    del fields["fingerprint"]
    fields["fingerprint"] = hashlib.sha256(canonical(fields)).hexdigest()
    (cache / "cache.json").write_text(json.dumps(fields, sort_keys=True, indent=1) + "\n")
    for attempt in (open_cache, open_writer, read_header, verify):
        with pytest.raises(CacheError, match=r"compressed with Blosc.*: extract again into a new folder") as caught:
            attempt(cache)
        assert not isinstance(caught.value, CacheDamage)


@pytest.mark.parametrize("answer", [errno.EBADF, errno.ENOSYS])
def test_partial_files_are_asked_about_as_nfs_wants_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    """NFS locks exclusively what is open for writing alone; other file systems have no locks, and the file stays."""
    lock = fcntl.flock

    def flock(file: IO[bytes], how: int) -> None:
        if answer == errno.ENOSYS or not file.writable():
            raise OSError(answer, os.strerror(answer))
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    file = next(f for f in cache.rglob("*") if f.name.startswith(("c.1", "000001")))
    partial = file.with_name(f".{file.name}.00ff.partial")
    partial.write_bytes(b"half")
    writer = open_writer(cache)
    writer.withdraw(1)
    writer.clean_partial(1)
    assert partial.exists() == (answer == errno.ENOSYS)
