"""Listings that are kept: believed while the images are as they were, by every process, and never otherwise."""

import io
import logging
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from pipeline.data import listing, listing_index
from pipeline.data.images import ImageSource, open_images
from pipeline.errors import DataError, StorageError

YESTERDAY = time.time_ns() - 86400 * 10**9


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """Where listings of any size go."""
    monkeypatch.setenv("MRMAE_LISTINGS", str(tmp_path / "kept"))
    monkeypatch.setattr(listing_index, "WORTH_KEEPING", 1)
    caplog.set_level(logging.INFO)
    return tmp_path / "kept"


def make(root: Path, kind: str) -> str:
    """Twelve images of yesterday; the path that names them."""
    root.mkdir()
    if kind == "tar":
        for number in range(3):
            pack(root / f"{number}.tar", 4)
        return f"{root}/{{0..2}}.tar"
    if kind == "parquet":
        for number in range(3):
            file = root / f"{number}.parquet"
            parquet.write_table(pyarrow.table({"image": [b"x" * 100_000] * 4, "label": range(4)}), file)
            os.utime(file, ns=(YESTERDAY, YESTERDAY))
        return f"{root}/*.parquet"
    for number in range(12):
        folder = root / (f"class{number % 3}/deep" if kind == "tree" else "")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}.jpg").write_bytes(b"x" * (100 + number))
    age(root)
    return str(root)


def pack(path: Path, images: int, mtime: int = YESTERDAY) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(images):
            for name, content in ((f"{number}.jpg", b"x" * 100), (f"{number}.cls", b"%d" % (number % 2))):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    os.utime(path, ns=(mtime, mtime))


def age(root: Path, mtime: int = YESTERDAY) -> None:
    for folder, _, _ in os.walk(root):
        os.utime(folder, ns=(mtime, mtime))


def rows(source: ImageSource) -> list[tuple[str, bytes, int]]:
    return [(source.key(i), source.read(i), source.label(i)) for i in range(len(source))]


def never(*_: object) -> None:
    raise AssertionError("listed again")


@pytest.mark.parametrize("kind", ["tree", "flat", "tar", "parquet"])
def test_the_second_start_lists_nothing_and_finds_the_same(
    tmp_path: Path, kept: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = make(tmp_path / "images", kind)
    monkeypatch.setenv("MRMAE_LISTINGS", "")
    plain = open_images(path)
    monkeypatch.setenv("MRMAE_LISTINGS", str(kept))
    first = open_images(path)
    monkeypatch.setattr(listing_index, "list_folder", never)
    monkeypatch.setattr(listing_index, "list_tars", never)
    monkeypatch.setattr(listing_index, "list_parquet", never)
    second = open_images(path)
    assert rows(plain) == rows(first) == rows(second)
    assert plain.digest() == first.digest() == second.digest()
    assert (plain.classes, plain.kind) == (second.classes, second.kind)
    assert rows(open_images(path, limit=5)) == [rows(plain)[place] for place in (0, 2, 4, 7, 9)]
    assert isinstance(np.asarray(second.keys).base, np.ndarray)  # mapped, by the first process as well
    assert not first.keys.flags.writeable
    messages = [record.getMessage() for record in caplog.records]
    assert sum(" listed " in message for message in messages) == 2
    assert f"12 images at {path}: from {second.index}" in messages[-1]


CHANGES = {
    "tree": {
        "added": lambda root: (root / "class1/deep/zz.jpg").write_bytes(b"x"),
        "removed": lambda root: (root / "class1/deep/01.jpg").unlink(),
        "renamed": lambda root: (root / "class1/deep/01.jpg").rename(root / "class1/deep/001.jpg"),
        "new class": lambda root: [(root / "class9").mkdir(), (root / "class9/a.jpg").write_bytes(b"x")],
        "class renamed": lambda root: (root / "class1").rename(root / "class8"),
        "folder away": lambda root: (
            [(root / "class1/deep" / f"{n:02d}.jpg").unlink() for n in (1, 4, 7, 10)] + [(root / "class1/deep").rmdir()]
        ),
    },
    "tar": {
        "longer": lambda root: pack(root / "1.tar", 9),
        "same size": lambda root: pack(root / "1.tar", 4, YESTERDAY + 1),
    },
}


@pytest.mark.parametrize(("kind", "change"), [(kind, change) for kind, all in CHANGES.items() for change in all])
def test_what_changed_is_listed_again(
    tmp_path: Path, kind: str, change: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = make(tmp_path / "images", kind)
    open_images(path)
    CHANGES[kind][change](tmp_path / "images")
    caplog.clear()
    now = open_images(path)
    monkeypatch.setenv("MRMAE_LISTINGS", "")
    assert rows(now) == rows(open_images(path))
    assert [" listed " in record.getMessage() for record in caplog.records if " images at " in record.getMessage()] == [
        True,
        True,
    ]


def test_other_tars_of_the_same_pattern(tmp_path: Path) -> None:
    path = make(tmp_path / "images", "tar").replace("{0..2}", "*")
    assert len(open_images(path)) == 12
    pack(tmp_path / "images/3.tar", 4)
    assert len(open_images(path)) == 16


def test_a_link_that_points_elsewhere(tmp_path: Path) -> None:
    """Two versions whose folders were copied with their times."""
    for name in ("one", "two"):
        make(tmp_path / name, "tree")
    (tmp_path / "two/class0/deep/00.jpg").write_bytes(b"other")
    link = tmp_path / "current"
    link.symlink_to("one")
    first = open_images(str(link)).digest()
    link.unlink()
    link.symlink_to("two")
    assert open_images(str(link)).digest() != first


def test_damage_is_never_believed(tmp_path: Path, kept: Path) -> None:
    """Any byte that changed, any end that is missing: listed anew, and kept anew."""
    path = make(tmp_path / "images", "tree")
    expected = rows(open_images(path))
    (index,) = kept.glob("*.listing")
    whole = index.read_bytes()
    keys = whole.index(b"class0/deep/00.jpg")
    for damaged in (
        *(whole[:length] for length in (0, 5, 30, 100, keys + 3, len(whole) - 1)),
        *(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in (0, 17, 25, 40, keys, len(whole) - 1)),
    ):
        index.write_bytes(damaged)
        assert rows(open_images(path)) == expected
        assert index.read_bytes() == whole


def test_nothing_is_kept_of_what_is_small_or_changes(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "images", "tree")
    (tmp_path / "images/class0/deep/late.jpg").write_bytes(b"x")  # another could come within the same time stamp
    open_images(path)
    age(tmp_path / "images")
    monkeypatch.setattr(listing_index, "WORTH_KEEPING", 14)
    open_images(path)
    assert not kept.exists()


def test_a_folder_that_can_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A read-only home: a file in the folder's place stands for it, since root may write anywhere."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("MRMAE_LISTINGS", str(tmp_path / "file/kept"))
    path = make(tmp_path / "images", "tree")
    assert len(open_images(path)) == len(open_images(path)) == 12
    assert "is not kept" in caplog.text
    assert "MRMAE_LISTINGS=FOLDER" in caplog.text


def test_where_listings_go_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MRMAE_LISTINGS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    open_images(make(tmp_path / "images", "tree"))
    assert len(list((tmp_path / "cache/mrmae/listings").glob("*.listing"))) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    open_images(str(tmp_path / "images"))
    assert len(list((tmp_path / "home/.cache/mrmae/listings").glob("*.listing"))) == 1


def test_what_was_not_used_for_a_month_goes_with_the_next_list(tmp_path: Path, kept: Path) -> None:
    path = make(tmp_path / "images", "tree")
    open_images(path)
    (index,) = kept.glob("*.listing")
    os.utime(index, (time.time() - 40 * 86400,) * 2)
    (tmp_path / "images/class0/deep/00.jpg").unlink()
    age(tmp_path / "images", YESTERDAY + 1)
    open_images(path)
    (other,) = kept.glob("*.listing")
    assert other != index


@pytest.mark.parametrize("kind", ["tree", "tar"])
def test_an_image_rewritten_in_place_stops_the_run_and_is_listed_anew(tmp_path: Path, kind: str) -> None:
    """No folder's time tells of it, or a copy kept the tar's; a cache would carry a digest of other lengths."""
    path = make(tmp_path / "images", kind)
    open_images(path)
    if kind == "tree":
        (tmp_path / "images/class0/deep/00.jpg").write_bytes(b"mended")
    else:
        facts = (tmp_path / "images/0.tar").stat()
    source = open_images(path)
    if kind == "tar":
        os.truncate(tmp_path / "images/0.tar", 550)
        os.utime(tmp_path / "images/0.tar", ns=(facts.st_mtime_ns, facts.st_mtime_ns))
    with pytest.raises(StorageError, match=r"^image .* bytes and had 100 when it was listed: run again"):
        source.read(0)
    assert not Path(source.index).exists()
    if kind == "tree":
        assert open_images(path).read(0) == b"mended"


_OPEN = """
import logging, sys
from pipeline.data import listing, listing_index
logging.basicConfig(level=logging.INFO, format="%(message)s")
listing_index.WORTH_KEEPING = 1
if sys.argv[2] == "hang":
    def wait(path):
        print("listing", flush=True)
        sys.stdin.read()
        return listing.list_folder(path)
    listing_index.list_folder = wait
listing, _ = listing_index.open_listing(sys.argv[1], ())
print(len(listing), flush=True)
"""


def start(path: str, how: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", _OPEN, path, how],
        cwd=Path(__file__).parents[3],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("ends", ["well", "killed"])
def test_others_wait_for_the_first_and_go_on_without_it(tmp_path: Path, ends: str) -> None:
    path = make(tmp_path / "images", "tree")
    first = start(path, "hang")
    assert first.stdout
    assert first.stdout.readline() == "listing\n"
    others = [start(path, "at once") for _ in range(2)]
    for other in others:
        assert other.stderr
        assert "another process lists" in other.stderr.readline()
    if ends == "killed":
        first.send_signal(signal.SIGKILL)
    first.communicate()
    said = [other.communicate(timeout=30) for other in others]
    assert [out for out, _ in said] == ["12\n", "12\n"]
    assert all((": from " if ends == "well" else ": listed ") in err for _, err in said)


def test_threads_take_over_where_a_disk_is_slow() -> None:
    """64 calls that wait 50 ms each would be 3.2 s; calls that compute stay in one thread."""
    seen: list[str] = []

    def wait(item: int) -> int:
        seen.append(threading.current_thread().name)
        time.sleep(0.05)
        return item

    began = time.perf_counter()
    assert listing.spread(wait, range(64), "call") == list(range(64))
    assert time.perf_counter() - began < 2
    assert len(set(seen)) > 8

    def compute(item: int) -> str:
        until = time.thread_time() + 0.05
        while time.thread_time() < until:
            pass
        return threading.current_thread().name

    assert threading.current_thread().name in listing.spread(compute, range(8), "call")[:4]


def test_an_error_in_a_thread_ends_the_listing() -> None:
    def fail(item: int) -> None:
        time.sleep(0.05)
        if item == 20:
            raise DataError("data.path: gone")

    with pytest.raises(DataError, match="gone"):
        listing.spread(fail, range(10_000), "call")
