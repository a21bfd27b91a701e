"""What lies at a path: every image of a folder or of tars, in blocks, so that memory stays near the size of the list.

A listing is a few arrays. `ImageSource` reads by them; `listing_index.py` keeps them for the next process.
"""

import functools
import os
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.data.tar_headers import Member, TarWalk, open_tar
from pipeline.errors import DataError
from pipeline.progress import Progress

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})

_ENDINGS = frozenset(extension.encode() for extension in EXTENSIONS)
_LONGEST_NUMBER = 256  # bytes of a KEY.cls that is read
_THREADS = 32  # that wait for a disk
_PATIENCE = 0.2  # seconds of one thread before more are thought of

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Listing:
    """N images. `watched` are the folders (relative to the root) or tars that were looked at, K of them."""

    kind: Literal["tree", "flat", "tar"]
    classes: tuple[str, ...]  # names, by label; empty if unknown
    text_class: str  # where a class is no number, in words; empty where all are
    keys: NDArray[np.bytes_]  # [N] UTF-8, fixed width
    lengths: NDArray[np.int64]  # [N] bytes of each encoded image
    labels: NDArray[np.int64]  # [N], -1 without a class
    offsets: NDArray[np.int64]  # [N, 2] (tar number, offset); [0, 2] for folders
    watched: NDArray[np.bytes_]  # [K]
    stamps: NDArray[np.int64]  # [K, 2] bytes (0 for folders) and mtime in ns, as they were before they were listed

    def __len__(self) -> int:
        return len(self.keys)


class _Folder(NamedTuple):
    prefix: bytes  # below the root; empty, or ends with a slash
    mtime: int
    keys: NDArray[np.bytes_]  # of its own images, sorted
    folders: list[bytes]  # prefixes, sorted


class _Tar(NamedTuple):
    keys: NDArray[np.bytes_]
    numbers: NDArray[np.int64]  # [n, 3] length, label, offset
    text_class: str
    stamp: tuple[int, int]


def list_folder(root: str) -> Listing:
    """A class-folder tree or a flat folder, by the keys' order. Hidden files and folders are passed over.

    Raises:
        DataError: images both beside and inside class folders; a folder that can't be read; a name that is no UTF-8.
    """
    folders = _folders(os.fsencode(root))
    flat = len(folders[0].keys) > 0
    if flat and any(len(folder.keys) for folder in folders[1:]):
        stray = os.fsdecode(folders[0].keys[0])
        raise DataError(f"data.path={root}: images both in class folders and beside them ({stray}); move one kind away")
    watched = _pack([folder.prefix or b"." for folder in folders])
    stamps = np.array([(0, folder.mtime) for folder in folders], dtype=np.int64)
    blocks = [folder.keys for folder in folders if len(folder.keys)]
    del folders  # so that `_join` frees block by block
    owners = [b"" if flat else bytes(block[0]).split(b"/", 1)[0] for block in blocks]
    classes = [] if flat else sorted(set(owners))
    number = {name: label for label, name in enumerate(classes)}
    sizes = [len(block) for block in blocks]
    labels = np.repeat(np.array([number.get(name, -1) for name in owners], dtype=np.int64), sizes)
    keys = _join(blocks)
    if not (keys[:-1] <= keys[1:]).all():  # as where a-b/1 comes before a/1
        order = np.argsort(keys, kind="stable")
        keys, labels = keys[order], labels[order]
    return Listing(
        kind="flat" if flat or not len(keys) else "tree",
        classes=tuple(name.decode() for name in classes),
        text_class="",
        keys=keys,
        lengths=_lengths(os.fsencode(root), keys),
        labels=labels,
        offsets=np.empty((0, 2), np.int64),
        watched=watched,
        stamps=stamps,
    )


def list_tars(tars: Sequence[str]) -> Listing:
    """The images of tars, in the order in which they were packed; the class of KEY.jpg is the number in KEY.cls.

    Raises:
        DataError: a tar that can't be read, or a name that is no UTF-8.
    """
    parts = spread(_list_tar, tars, "tar")
    sizes = [len(part.keys) for part in parts]
    text_class = next((part.text_class for part in parts if part.text_class), "")
    stamps = np.array([part.stamp for part in parts], dtype=np.int64)
    lengths, labels, places = (np.concatenate([part.numbers[:, column] for part in parts]) for column in range(3))
    blocks = [part.keys for part in parts]
    del parts  # so that `_join` frees block by block
    return Listing(
        kind="tar",
        classes=(),
        text_class=text_class,
        keys=_join(blocks),
        lengths=lengths,
        labels=labels,
        offsets=np.stack([np.repeat(np.arange(len(tars)), sizes), places], axis=1),
        watched=_pack([os.fsencode(tar) for tar in tars]),
        stamps=stamps,
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
    keys, folders = [], []
    try:
        mtime = os.stat(path).st_mtime_ns
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(b"."):
                    continue  # .ipynb_checkpoints is no class
                if entry.is_dir():
                    folders.append(prefix + name + b"/")
                elif name[name.rfind(b".") :].lower() in _ENDINGS:
                    keys.append(prefix + name)
    except OSError as error:
        raise DataError(f"data.path: {os.fsdecode(path)}: {error.strerror or error}") from error
    keys.sort()
    return _Folder(prefix, mtime, _pack(keys), folders)


def _lengths(root: bytes, keys: NDArray[np.bytes_]) -> NDArray[np.int64]:
    blocks = np.split(keys, range(1024, len(keys), 1024))
    return np.concatenate(spread(functools.partial(_block_lengths, root), blocks, "1,024 files"))


def _block_lengths(root: bytes, keys: NDArray[np.bytes_]) -> NDArray[np.int64]:
    lengths = np.zeros(len(keys), np.int64)
    for place, key in enumerate(keys.tolist()):
        try:
            lengths[place] = os.stat(root + b"/" + key).st_size
        except FileNotFoundError:
            pass  # a link to nowhere: an image that can't be read
        except OSError as error:
            raise DataError(f"data.path: {os.fsdecode(key)}: {error.strerror or error}") from error
    return lengths


def _list_tar(tar: str) -> _Tar:
    images: dict[bytes, tuple[bytes, int, int]] = {}
    labels: dict[bytes, int] = {}
    text_class = ""
    with open_tar(tar) as members:
        stamp = members.stamp
        for member in members:
            stem, _, extension = member.name.rpartition(b".")
            if b"." + extension.lower() in _ENDINGS:
                images[stem] = (member.name, member.size, member.offset)
            elif extension == b"cls":
                label = _class_number(members, member)
                labels[stem] = -1 if label is None else label
                if label is None and not text_class:
                    text_class = f"{os.path.basename(tar)}/{os.fsdecode(member.name)}"
    shard = os.fsencode(os.path.basename(tar)) + b"/"
    rows = [(size, labels.get(stem, -1), offset) for stem, (_, size, offset) in images.items()]
    return _Tar(
        _pack([shard + name for name, _, _ in images.values()]),
        np.array(rows, dtype=np.int64).reshape(-1, 3),
        text_class,
        stamp,
    )


def _class_number(tar: TarWalk, member: Member) -> int | None:
    """None: the class is no number, or one that no label can hold."""
    if member.size > _LONGEST_NUMBER:
        return None
    try:
        number = int(tar.read(member))
    except ValueError:
        return None
    return number if abs(number) < 2**63 else None


def _pack(names: list[bytes]) -> NDArray[np.bytes_]:
    """Names as one block of bytes.

    Raises:
        DataError: one of them is no UTF-8.
    """
    try:
        b"\0".join(names).decode()
    except UnicodeDecodeError as error:
        at = error.object[: error.start].count(b"\0")
        name = ascii(os.fsdecode(error.object.split(b"\0")[at]))
        raise DataError(
            f"data.path: the file name {name} is no UTF-8, as keys are: rename it, then run again"
        ) from error
    return np.array(names, dtype=np.bytes_)


def _join(blocks: list[NDArray[np.bytes_]]) -> NDArray[np.bytes_]:
    """One array of all, as wide as the widest; the blocks are freed on the way."""
    width = max((block.dtype.itemsize for block in blocks), default=1)
    joined = np.empty(sum(map(len, blocks)), f"S{width}")
    place = 0
    blocks.reverse()
    while blocks:
        block = blocks.pop()
        joined[place : place + len(block)] = block
        place += len(block)
    return joined
