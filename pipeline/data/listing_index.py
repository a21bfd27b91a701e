"""Listings kept in files, so that a large dataset is listed once and not by every process of every command.

A file holds what a listing holds, with the sizes and times of the folders or files that it was made from. It is
believed only while these are still the same and while every byte of it is; it is written whole or not at all, and never
changed. All processes of a node map the same file.
"""

import contextlib
import fcntl
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.data.listing import Listing, list_folder, list_tars
from pipeline.data.naming import EXTENSIONS
from pipeline.data.parquet.files import list_parquet
from pipeline.files import whole_file

log = logging.getLogger(__name__)

VARIABLE = "MRMAE_LISTINGS"  # the folder of the kept listings; empty: keep none
WORTH_KEEPING = 10_000  # images; fewer are listed in a moment

_MAGIC = b"mrmae listing 2\n"
_ARRAYS = ("keys", "lengths", "labels", "offsets", "watched", "stamps", "pages", "blocks")
_ALIGNED = 64
_START = len(_MAGIC) + 16  # then the head's length and its hash
_QUIET = 2_000_000_000  # ns; what changed later than this before a listing may change again within the same time stamp
_UNUSED = 30 * 86400  # seconds after which an outdated listing goes; no run maps it any more


def open_listing(path: str, files: Sequence[str]) -> tuple[Listing, str]:
    """The images at `path`, a folder or else the `files`; and the file that they are kept in, if any.

    The first process of a node lists, the others wait for it. Where it keeps no list or dies, each lists for itself.

    Raises:
        DataError: as `list_folder`, `list_tars` and `list_parquet`.
    """
    began = time.perf_counter()
    place = _place(path)
    found = _find(place, path, files)
    if found is None and place is not None:
        with _alone(place, path) as waited:
            found = _find(place, path, files)
            if found is None and not waited:
                return _list_and_keep(place, path, files)
    if found is None:
        return _list(path, files), ""
    listing, index = found
    log.info("%d images at %s: from %s, in %.2f s", len(listing), path, index, time.perf_counter() - began)
    return found


def is_noted_readable(index: str) -> bool:
    """Whether every image of a kept list was found readable; as the list, it is believed while nothing has changed."""
    return bool(index) and _note(Path(index)).exists()


def note_readable(index: str) -> None:
    """Note that every image of a kept list was found readable."""
    with contextlib.suppress(OSError):  # the next start looks again
        if index:
            _note(Path(index)).touch()


def _note(index: Path) -> Path:
    return index.with_suffix(".readable")


def _list(path: str, files: Sequence[str]) -> Listing:
    began = time.perf_counter()
    listing = _list_files(files) if files else list_folder(path)
    what = f"{len(files)} files" if files else f"{len(listing.watched)} folders"
    log.info("%d images at %s: listed %s in %.2f s", len(listing), path, what, time.perf_counter() - began)
    return listing


def _list_files(files: Sequence[str]) -> Listing:
    """The images of tars, or of parquet files. Errors as `list_tars` and `list_parquet`."""
    return list_tars(files) if files[0].endswith(".tar") else list_parquet(files)


def _list_and_keep(place: Path, path: str, files: Sequence[str]) -> tuple[Listing, str]:
    started = time.time_ns()
    listing = _list(path, files)
    if len(listing) < WORTH_KEEPING:
        return listing, ""
    if int(listing.stamps[:, 1].max()) > started - _QUIET:
        log.info("the list of %s is not kept: the images changed only just now", path)
        return listing, ""
    try:
        index = _write(place, path, listing)
    except OSError as error:
        log.info("the list of %s is not kept: %s; %s=FOLDER says where it may be", path, error, VARIABLE)
        return listing, ""
    mapped = _read(index, path)
    return (mapped, str(index)) if mapped else (listing, "")  # mapped, and the memory of listing is free


def _place(path: str) -> Path | None:
    """How the files with listings of this path begin, or None where none are kept."""
    folder = os.environ.get(VARIABLE)
    if folder is None:
        try:
            folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mrmae", "listings")
        except RuntimeError:  # no home
            return None
    asked = "\0".join([*sorted(EXTENSIONS), os.path.realpath(path), path])
    return Path(folder, xxhash.xxh3_128_hexdigest(os.fsencode(asked))) if folder else None


@contextlib.contextmanager
def _alone(place: Path, path: str) -> Iterator[bool]:
    """One process of a node at a time; gives whether it had to wait. The lock goes with its process, however it ends.

    It lies on the node's own disk: locks of network file systems may outlive a machine that died.
    """
    lock = os.path.join(tempfile.gettempdir(), f"mrmae-{os.getuid()}-{place.name}.lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        yield False
        return
    try:
        waited = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process lists %s: waiting for it", path)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            waited = True
        yield waited
    finally:
        os.close(descriptor)


def _find(place: Path | None, path: str, files: Sequence[str]) -> tuple[Listing, str] | None:
    """A kept listing that is whole and up to date."""
    if place is None:
        return None
    for index in _newest_first(place):
        listing = _read(index, path)
        if listing is None:
            with contextlib.suppress(OSError):
                index.unlink()
        elif _is_current(listing, path, files):
            with contextlib.suppress(OSError):
                os.utime(index)
            return listing, str(index)
    return None


def _newest_first(place: Path) -> list[Path]:
    def age(index: Path) -> float:
        with contextlib.suppress(OSError):
            return -index.stat().st_mtime
        return 0.0

    return sorted(place.parent.glob(f"{place.name}-*.listing"), key=age)


def _is_current(listing: Listing, path: str, files: Sequence[str]) -> bool:
    """Whether the same files, or all folders of a tree, have the sizes and times that they had."""
    watched = [os.fsdecode(name) for name in listing.watched.tolist()]
    if (files and watched != list(files)) or bool(files) != (listing.kind in ("tar", "parquet")):
        return False
    for name, stamp in zip(watched, listing.stamps.tolist(), strict=True):
        try:
            facts = os.stat(os.path.join(path, name))
        except OSError:
            return False
        if stamp != [facts.st_size if files else 0, facts.st_mtime_ns]:
            return False
    return True


def _write(place: Path, path: str, listing: Listing) -> Path:
    """Keep a listing under a name that its contents give, and clear away what is outdated.

    The files of one path differ in their names, so that none is replaced while another machine maps it.
    """
    names = _ARRAYS if listing.kind == "parquet" else _ARRAYS[:-2]
    arrays = {name: np.ascontiguousarray(getattr(listing, name)) for name in names}
    head = json.dumps(
        {
            "path": path,
            "arrays": {
                name: [array.dtype.str, array.shape, xxhash.xxh3_64_hexdigest(_bytes(array))]
                for name, array in arrays.items()
            },
        }
        | {field.name: getattr(listing, field.name) for field in fields(listing) if field.name not in _ARRAYS}
    ).encode()
    start = _MAGIC + len(head).to_bytes(8, "little") + xxhash.xxh3_64_digest(head)
    index = place.with_name(f"{place.name}-{xxhash.xxh3_64_hexdigest(head)}.listing")
    with whole_file(index) as partial, partial.open("wb") as file:
        file.write(start + head)
        for array in arrays.values():
            file.write(bytes(-file.tell() % _ALIGNED))
            file.write(_bytes(array))
    _clear(place, index)
    return index


def _clear(place: Path, index: Path) -> None:
    """Away with listings of the same path that were not used for long, and with what killed processes left."""
    for old in [*place.parent.glob(f"{place.name}-*"), *place.parent.glob(f".{place.name}-*.partial")]:
        with contextlib.suppress(OSError):  # another process was faster, or it is not ours to take
            if old != index and time.time() - old.stat().st_mtime > _UNUSED:
                old.unlink()


def _read(index: Path, path: str) -> Listing | None:
    """Map a kept listing; None if a byte of it is not what was written."""
    try:
        raw = np.memmap(index, np.uint8, mode="r")
    except (OSError, ValueError):  # ValueError: empty
        return None
    size = int.from_bytes(raw[len(_MAGIC) : len(_MAGIC) + 8].tobytes(), "little")
    start, head = raw[:_START].tobytes(), raw[_START : _START + size].tobytes()
    if start != _MAGIC + len(head).to_bytes(8, "little") + xxhash.xxh3_64_digest(head):
        return None
    facts: dict[str, Any] = json.loads(head)
    if facts.pop("path") != path:
        return None
    arrays: dict[str, Any] = {}
    at = _START + size
    for name, (dtype, shape, digest) in facts.pop("arrays").items():
        at += -at % _ALIGNED
        block = raw[at : at + int(np.prod(shape)) * np.dtype(dtype).itemsize]
        at += block.nbytes
        if xxhash.xxh3_64_hexdigest(_bytes(block)) != digest:
            return None
        arrays[name] = np.asarray(block).view(dtype).reshape(shape)
    return Listing(**arrays, **facts | {"classes": tuple(facts["classes"])})


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
