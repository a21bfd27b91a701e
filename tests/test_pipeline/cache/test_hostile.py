"""Caches that someone crafted, and files that are none: nothing hangs, fills memory or reads outside the cache."""

import contextlib
import json
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.cache import (
    Reextracted,
    compare,
    create_cache,
    open_cache,
    open_writer,
    read_commit,
    read_header,
    repair,
    verify,
)
from pipeline.cache.files import hash_file
from pipeline.cache.format.commits import Commit, committed_shards, write_commit
from pipeline.errors import CacheDamage, CacheError
from pipeline.files import hash_source
from stages.verify_cache import Verification
from tests import forked
from tests.test_pipeline.cache.samples import STORES, make_cache, make_header, make_shard, source_bytes


def dataset(count: int) -> dict[str, object]:
    return {"source": "photos", "kind": "folder", "count": count, "digest": "d" * 32}


@pytest.fixture(autouse=True)
def at_most_ten_minutes() -> Iterator[None]:
    """What hangs fails, rather than the whole suite with it."""

    def hangs(*_: object) -> None:
        raise TimeoutError("it hangs")

    former = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(600)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"dataset": dataset(10**12)}, "dataset.count: must be 1000000000 or less"),
        ({"dataset": dataset(10**9), "samples_per_shard": 1}, "1000000000 shards are more than the 1000000 allowed"),
        ({"samples_per_shard": 10**12}, "samples_per_shard: must be 1048576 or less"),
        ({"teacher": {"grid": [10**6, 10**6], "dim": 8}}, "grid, dim or heads are too large"),
        ({"attention": "heads", "heads": 10**12}, "grid, dim or heads are too large"),
        ({"views": {"count": 2, "seed": 3, "image_size": 10**9}}, "views.image_size: must be 65536 or less"),
    ],
)
def test_a_header_that_asks_for_too_much_is_refused_before_room_is_made(
    tmp_path: Path, changes: dict[str, object], problem: str
) -> None:
    fields = {**json.loads(make_header().to_bytes()), **changes, "fingerprint": ""}
    (tmp_path / "cache.json").write_text(json.dumps(fields, sort_keys=True, indent=1))
    with pytest.raises(CacheDamage, match=re.escape(problem)):
        read_header(tmp_path)


LOOK = """
import sys, time
from pathlib import Path
from pipeline.cache import open_cache, verify
from stages import cache_info
began, path = time.process_time(), Path(sys.argv[1])
report = verify(path, "full")
print(len(report.missing), len(report.findings), len(open_cache(path).live_indices()))
print(cache_info.run(cache_info.CacheInfoConfig(path=path))["committed"])
assert time.process_time() - began < 20
"""


@pytest.mark.parametrize("store", STORES)
def test_a_cache_of_a_billion_samples_without_shards_hangs_no_tool(tmp_path: Path, store: str) -> None:
    path = tmp_path / "cache"
    create_cache(path, make_header(store, dataset=dataset(10**9), samples_per_shard=1024))
    done = forked.run([sys.executable, "-c", LOOK, str(path)], text=True)
    assert done.stdout.split() == ["976563", "11", "0", "0"], done.stderr


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "shards/../../secret", "a//b", "./a", ""])
def test_a_commit_record_that_names_files_outside_is_damaged(tmp_path: Path, store: str, name: str) -> None:
    path = make_cache(tmp_path / "cache", make_header(store))
    secret = tmp_path / "secret"
    secret.write_text("secret")
    commit = Commit.from_bytes((path / "commits/000001.json").read_bytes())
    write_commit(path, commit.model_copy(update={"files": {**commit.files, name: hash_file(secret)}}))
    assert [(f.kind, f.shard) for f in verify(path, "full").findings] == [("commit", 1)]
    with pytest.raises(CacheDamage, match="it names a file outside the cache"):
        open_cache(path)


def test_verify_opens_no_file_that_a_commit_record_adds(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache", make_header())
    (path / "foreign").symlink_to("/dev/zero")
    commit = Commit.from_bytes((path / "commits/000001.json").read_bytes())
    entry = next(iter(commit.files.values()))
    write_commit(path, commit.model_copy(update={"files": {**commit.files, "foreign": entry}}))
    assert [(f.kind, f.shard) for f in verify(path, "full").findings] == [("commit", 1)]


def pipe(file: Path) -> None:
    os.mkfifo(file)


def endless(file: Path) -> None:
    file.symlink_to("/dev/zero")


def itself(file: Path) -> None:
    file.symlink_to(file.name)


def hole(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(1 << 40)


def folder(file: Path) -> None:
    file.mkdir()


def unix_socket(file: Path) -> None:
    # By a short name: the path of a socket has 107 bytes at most.
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(file.parent):
        server.bind(file.name)


_SLOW_IN_ZARR = [  # eight files each take their turn there
    pytest.param("zarr", make, marks=pytest.mark.slow) for make in (endless, hole, folder, unix_socket)
]


@pytest.mark.parametrize(
    ("store", "make"),
    [("zarr", pipe), ("zarr", itself), *_SLOW_IN_ZARR]
    + [("webdataset", make) for make in (pipe, endless, itself, hole, folder, unix_socket)],
)
def test_what_is_no_regular_file_is_found_not_opened_and_repaired(
    tmp_path: Path, store: str, make: Callable[[Path], None]
) -> None:
    header = make_header(store)
    path = make_cache(tmp_path / "cache", header)
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.name in {"zarr.json", "000001.json", "000001-00.tar", "000001-00.index"} or file.name.startswith("c.1")
    ]
    assert len(files) == (24 if store == "zarr" else 3)
    for file in files:
        content = file.read_bytes()
        file.unlink()
        make(file)
        report = verify(path, "full")
        assert not report.sound, file
        assert {f.shard for f in report.findings} <= {1, None}
        repair(path, report, lambda shard: make_shard(header, shard))
        assert file.read_bytes() == content
        assert verify(path, "full").sound, file


@pytest.mark.parametrize("make", [pipe, endless, itself, hole, folder])
def test_reading_meets_what_is_no_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = make_cache(tmp_path / "cache", make_header("webdataset"))
    for name in ("shards/000001-00.tar", "commits/000001.json"):
        (path / name).unlink()
        make(path / name)
        with pytest.raises(CacheDamage, match=r"shard 1"):
            open_cache(path).read(4, 0)


def test_a_folder_with_content_is_left_to_its_owner(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache", make_header("webdataset"))
    tar = path / "shards/000001-00.tar"
    tar.unlink()
    tar.mkdir()
    (tar / "mine").write_text("mine")
    with pytest.raises(CacheError, match="is no regular file and can't be removed"):
        repair(path, verify(path, "quick"), lambda shard: make_shard(read_header(path), shard))
    assert (tar / "mine").exists()


@pytest.mark.parametrize("blanks", [b" ", b"\n", b"\t\n  "])
def test_blanks_behind_the_metadata_are_found(tmp_path: Path, blanks: bytes) -> None:
    path = make_cache(tmp_path / "cache", make_header("zarr"))
    for file in ("zarr.json", "tokens/zarr.json"):
        content = (path / file).read_bytes()
        (path / file).write_bytes(content + blanks)
        assert [f.file for f in verify(path, "quick").findings] == [file]
        (path / file).write_bytes(json.dumps(json.loads(content)).encode())  # another layout: another zarr's
        assert verify(path, "quick").sound
        (path / file).write_bytes(content)


@pytest.mark.parametrize("quantiser", ["int8", "float16"])
@pytest.mark.parametrize("level", [0.0, 0.3, 2.0])
def test_constant_images_are_no_damage_at_level_deep(tmp_path: Path, quantiser: str, level: float) -> None:
    """Every token of a constant image may be the same: what quantisation rounds is then all that differs."""
    header = make_header("zarr", quantiser_name=quantiser, attention="none")
    tokens = np.broadcast_to(level + np.linspace(-2, 2, header.dim, dtype=np.float32), (header.tokens, header.dim))
    path = tmp_path / "cache"
    create_cache(path, header)
    for shard in range(header.shards):
        data = make_shard(header, shard)

        stored, scale = header.quantiser.quantise(torch.from_numpy(tokens.copy()).expand(*data.tokens.shape))
        data.tokens, data.scale = stored.numpy(), None if scale is None else scale.numpy()
        open_writer(path).write_shard(shard, data)

    def reextract(indices: list[int], views: list[int]) -> list[Reextracted]:
        return [
            Reextracted(tokens.copy(), None, (i, v, i + 1, v + 1), bool((i + v) % 2), hash_source(source_bytes(i)))
            for i, v in zip(indices, views, strict=True)
        ]

    report = verify(path, "deep", deep=partial(compare, path, reextract, 8))  # type: ignore[arg-type]
    assert report.sound, report.findings
    wrong = partial(compare, path, lambda i, v: [_scaled(r) for r in reextract(i, v)], 8)  # type: ignore[arg-type]
    assert {f.kind for f in verify(path, "deep", deep=wrong).findings} == {"deep"}


def _scaled(fresh: Reextracted) -> Reextracted:
    fresh.tokens = fresh.tokens[:, ::-1] * 1.5
    return fresh


def test_an_unfinished_cache_is_called_so_with_the_command_to_go_on(tmp_path: Path) -> None:
    header = make_header()
    path = tmp_path / "cache"
    create_cache(path, header)
    open_writer(path).write_shard(1, make_shard(header, 1))
    report = verify(path, "full")
    assert (report.unfinished, report.sound, report.missing) == (True, False, [0, 2])
    last = Verification(report, None, "checked").to_text().splitlines()[-1]
    assert "unfinished, 2 of 3 shards are missing" in last
    assert f"`mrmae verify-cache {path} --repair`" in last
    assert "DAMAGED" not in last
    repair(path, report, lambda shard: make_shard(header, shard))
    assert verify(path, "full").sound
    (path / "zarr.json").unlink()
    assert not verify(path, "full").unfinished
    assert committed_shards(path, header) == [0, 1, 2]
    assert read_commit(path, header, 2).count == 2
