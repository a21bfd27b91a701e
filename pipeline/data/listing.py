"""What lies at a path: every image of a folder or of files, in blocks, so that memory stays near the size of the list.

A listing is a few arrays. `ImageSource` reads by them; `listing_index.py` keeps them for the next process.
"""

import functools
import os
import resource
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.data.naming import (
    HIDDEN,
    IMAGE_ENDINGS,
    SYSTEM_FOLDERS,
    add_counts,
    companion,
    describe_ending,
    join,
    key_of,
    pack,
)
from pipeline.data.parquet.pages import no_blocks, no_pages
from pipeline.data.tar_content import check_names, read_content
from pipeline.errors import DataError
from pipeline.progress import Progress

_DOT = ord(".")
_THREADS = 32  # that wait for a disk
_PATIENCE = 0.2  # seconds of one thread before more are thought of

Kind = Literal["tree", "flat", "tar", "parquet"]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Listing:
    """N images. `watched` are the folders (relative to the root) or files that were looked at, K of them."""

    kind: Kind
    classes: tuple[str, ...]  # names, by label; empty if unknown
    text_class: str  # where a class is no number, in words; empty where all are
    keys: NDArray[np.bytes_]  # [N] UTF-8, fixed width
    lengths: NDArray[np.int64]  # [N] bytes of each encoded image
    labels: NDArray[np.int64]  # [N], -1 without a class
    offsets: NDArray[np.int64]  # [N, 2] (tar number, offset) or (page, offset in it); [0, 2] for folders
    watched: NDArray[np.bytes_]  # [K]
    stamps: NDArray[np.int64]  # [K, 2] bytes (0 for folders) and mtime in ns, as they were before they were listed
    passed_over: dict[str, int]  # why → how many files are there and no image or label
    pages: NDArray[np.int64] = field(default_factory=no_pages)  # of parquet files, as `parquet.pages.Column` has them
    blocks: NDArray[np.int64] = field(default_factory=no_blocks)

    def __len__(self) -> int:
        return len(self.keys)


class _Folder(NamedTuple):
    prefix: bytes  # below the root; empty, or ends with a slash
    mtime: int
    keys: NDArray[np.bytes_]  # of its own images, sorted
    folders: list[bytes]  # prefixes, sorted
    passed_over: dict[str, int]


class _Tar(NamedTuple):
    keys: NDArray[np.bytes_]
    numbers: NDArray[np.int64]  # [n, 3] length, label, offset
    text_class: str
    stamp: tuple[int, int]
    passed_over: dict[str, int]


def list_folder(root: str) -> Listing:
    """A class-folder tree or a flat folder, by the keys' order. Images beside class folders have no class.

    Raises:
        DataError: a folder that can't be read, or that a link inside it leads back to; a name that is no UTF-8.
    """
    folders = _folders(os.fsencode(root))
    watched = pack([folder.prefix or b"." for folder in folders])
    stamps = np.array([(0, folder.mtime) for folder in folders], dtype=np.int64)
    passed_over = add_counts(folder.passed_over for folder in folders)
    blocks = [folder.keys for folder in folders if len(folder.keys)]
    del folders  # so that `join` frees block by block
    owners = [bytes(block[0]).rpartition(b"/")[0].partition(b"/")[0] for block in blocks]  # b"": the root itself
    classes = sorted(set(owners) - {b""})
    number = {name: label for label, name in enumerate(classes)}
    sizes = [len(block) for block in blocks]
    labels = np.repeat(np.array([number.get(name, -1) for name in owners], dtype=np.int64), sizes)
    keys = join(blocks)
    if not (keys[:-1] <= keys[1:]).all():  # as where a-b/1 comes before a/1
        order = np.argsort(keys, kind="stable")
        keys, labels = keys[order], labels[order]
    return Listing(
        kind="tree" if classes else "flat",
        classes=tuple(name.decode() for name in classes),
        text_class="",
        keys=keys,
        lengths=_lengths(os.fsencode(root), keys),
        labels=labels,
        offsets=np.empty((0, 2), np.int64),
        watched=watched,
        stamps=stamps,
        passed_over=passed_over,
    )


def list_tars(tars: Sequence[str]) -> Listing:
    """The images of tars, in the order in which they were packed; the class of KEY.jpg is the number in KEY.cls.

    Raises:
        DataError: a tar that can't be read; a name that is no UTF-8; an image or class that is there twice, two
            images of one key, or a link to what isn't in the tar.
    """
    parts = spread(_list_tar, tars, "tar")
    sizes = [len(part.keys) for part in parts]
    text_class = next((part.text_class for part in parts if part.text_class), "")
    stamps = np.array([part.stamp for part in parts], dtype=np.int64)
    lengths, labels, places = (np.concatenate([part.numbers[:, column] for part in parts]) for column in range(3))
    passed_over = add_counts(part.passed_over for part in parts)
    blocks = [part.keys for part in parts]
    del parts  # so that `join` frees block by block
    keys = join(blocks)
    check_names(tars, keys)
    return Listing(
        kind="tar",
        classes=(),
        text_class=text_class,
        keys=keys,
        lengths=lengths,
        labels=labels,
        offsets=np.stack([np.repeat(np.arange(len(tars)), sizes), places], axis=1),
        watched=pack([os.fsencode(tar) for tar in tars]),
        stamps=stamps,
        passed_over=passed_over,
    )


def first_image(root: str) -> str | None:
    """An image below a folder, if there is one."""
    keys = (os.fsdecode(folder.keys[0]) for folder in _folders(os.fsencode(root)) if len(folder.keys))
    return next(keys, None)


def spread(function: Callable[[T], R], items: Iterable[T], unit: str) -> list[R]:
    """`map` in one thread, or in many where the first calls waited for a disk more than they computed."""
    todo = list(items)
    done: list[R] = []
    waits = _disk_waits()
    with Progress(len(todo), "list", unit) as progress:
        for item in todo:
            if waits():
                break
            done.append(function(item))
            progress.advance()
        else:
            return done
        pool = ThreadPoolExecutor(_THREADS)
        try:
            for result in pool.map(function, todo[len(done) :]):
                done.append(result)
                progress.advance()
        finally:
            pool.shutdown(cancel_futures=True)
    return done


def _disk_waits() -> Callable[[], bool]:
    """Whether this thread has waited for longer than it computed since then, and not because others had the CPU."""
    wall, cpu, before = time.perf_counter(), time.thread_time(), resource.getrusage(resource.RUSAGE_THREAD)

    def waits() -> bool:
        seconds, usage = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_THREAD)
        is_idle = seconds > _PATIENCE and time.thread_time() - cpu < seconds / 2
        return is_idle and usage.ru_nvcsw - before.ru_nvcsw > usage.ru_nivcsw - before.ru_nivcsw

    return waits


def _folders(root: bytes) -> list[_Folder]:
    """The root and all folders below it, level by level, each level sorted."""
    found: list[_Folder] = []
    level = [b""]
    while level:
        folders = spread(functools.partial(_scan, root), level, "folder")
        level = sorted(prefix for folder in folders for prefix in folder.folders)
        found += folders
    return found


def _scan(root: bytes, prefix: bytes) -> _Folder:
    path = os.path.join(root, prefix)
    names: list[bytes] = []
    folders: list[bytes] = []
    dotted: list[bytes] = []  # names such as a.seg.jpg
    passed: Counter[str] = Counter()
    try:
        mtime = os.stat(path).st_mtime_ns
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == _DOT:
                    passed[HIDDEN] += 1
                    continue
                if entry.is_dir():
                    if name in SYSTEM_FOLDERS:
                        passed[HIDDEN] += 1
                        continue
                    if entry.is_symlink():
                        _check_way_out(path, entry.path)
                    folders.append(prefix + name + b"/")
                    continue
                stem, _, ending = name.rpartition(b".")
                if not stem or ending.lower() not in IMAGE_ENDINGS:
                    passed[describe_ending(ending.lower() if stem else b"")] += 1
                    continue
                names.append(name)
                if b"." in stem:
                    dotted.append(name)
    except OSError as error:
        raise DataError(f"data.path: {os.fsdecode(path)}: {error.strerror or error}") from error
    if dotted:
        plain = {name.rpartition(b".")[0] for name in names}
        companions = {name for name in dotted if key_of(name) in plain}
        names = [name for name in names if name not in companions]
        passed.update(map(companion, companions))
    names.sort()
    return _Folder(prefix, mtime, pack([prefix + name for name in names]), folders, passed)


def _check_way_out(path: bytes, link: bytes) -> None:
    """A link to a folder around it would have all images listed again and again."""
    target = os.path.realpath(link)
    if os.path.join(os.path.realpath(path), b"").startswith(os.path.join(target, b"")):
        raise DataError(
            f"data.path: {os.fsdecode(link)} is a link to {os.fsdecode(target)}, which holds it: remove the link"
        )


def _lengths(root: bytes, keys: NDArray[np.bytes_]) -> NDArray[np.int64]:
    blocks = np.split(keys, range(1024, len(keys), 1024))
    folder = os.open(root, os.O_RDONLY)  # a path from here is shorter than one from the root of the disk
    try:
        return np.concatenate(spread(functools.partial(_block_lengths, folder), blocks, "1,024 files"))
    finally:
        os.close(folder)


def _block_lengths(folder: int, keys: NDArray[np.bytes_]) -> NDArray[np.int64]:
    lengths = np.zeros(len(keys), np.int64)
    for place, key in enumerate(keys.tolist()):
        try:
            facts = os.stat(key, dir_fd=folder)
            lengths[place] = facts.st_size
            if not stat.S_ISREG(facts.st_mode):
                raise DataError(f"data.path: {os.fsdecode(key)} is a pipe, socket or device, no file: take it away")
        except FileNotFoundError:
            pass  # a link to nowhere: an image that can't be read
        except OSError as error:
            raise DataError(f"data.path: {os.fsdecode(key)}: {error.strerror or error}") from error
    return lengths


def _list_tar(tar: str) -> _Tar:
    content = read_content(tar)
    images, labels = content.images(), content.labels()
    shard = os.fsencode(os.path.basename(tar)) + b"/"
    numbers = [image.size for image in images], labels, [image.offset for image in images]
    return _Tar(
        pack([shard + image.name for image in images]),
        np.array(numbers, dtype=np.int64).T,
        content.text_class,
        content.stamp,
        content.passed_over,
    )
