"""Files as the cache writes and reads them: whole or not at all, durable before they are named, few descriptors open.

`write_file` is the only function of the cache that creates a file. A file appears under its name when every byte of it
is on the disk; until then it lies beside it as `.NAME.RANDOM.partial`.
"""

import contextlib
import errno
import fcntl
import glob
import os
import resource
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import preadv
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import xxhash
from awscrt.checksums import crc32c
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from pipeline.errors import CacheDamage, CacheError

PARTIAL = ".partial"
CHECKSUM_BYTES = 4
BLOCK = 1 << 20  # bytes that are walked more than once while the CPU's cache holds them
_PAGE = 4096
_MOST_FILES = 1 << 16  # open ones that a process asks for: where the hard limit is a billion, that isn't meant


class FileEntry(BaseModel):
    """What a commit record states about one file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    bytes: int
    xxh3_128: str


def write_file(path: Path, parts: Iterable[Any], *, exclusive: bool = False) -> FileEntry:
    """Write the concatenated parts (buffers) to `path` atomically and durably, and measure them.

    The folder is made when absent; the caller syncs it (`sync_folder`) once all of its files are there.

    Raises:
        FileExistsError: with `exclusive`, when the name is taken; that file is left as it is.
        OSError: disk full, read-only, ...; no trace stays behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    hasher, size = xxhash.xxh3_128(), 0
    try:
        with partial.open("wb", buffering=0) as file:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # says that the writer is alive
            for block in _blocks(parts):
                hasher.update(block)
                size += _write_all(file.fileno(), block)
            os.fsync(file.fileno())
            if exclusive:
                path.hardlink_to(partial)  # a rename would replace, a link refuses
            else:
                partial.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
    return FileEntry(bytes=size, xxh3_128=hasher.hexdigest())


def _blocks(parts: Iterable[Any]) -> Iterator[memoryview]:
    """The bytes of `parts` in blocks that the CPU's cache holds while they are hashed and written.

    Small parts are gathered: for the kernel, many pieces are dearer than one more copy. The next block overwrites one.
    """
    room = aligned(BLOCK).data
    held = 0
    for part in parts:
        if memoryview(part).nbytes == 0:
            continue
        content = memoryview(part).cast("B")
        if content.nbytes >= BLOCK // 2:
            if held:
                yield room[:held]
                held = 0
            yield from (content[start : start + BLOCK] for start in range(0, content.nbytes, BLOCK))
            continue
        if held + content.nbytes > BLOCK:
            yield room[:held]
            held = 0
        room[held : held + content.nbytes] = content
        held += content.nbytes
    if held:
        yield room[:held]


def _write_all(descriptor: int, block: memoryview) -> int:
    """Write a block, in one call or in as many as the kernel wants; returns its length."""
    written = 0
    while written < len(block):
        written += os.write(descriptor, block[written:])
    return written


def aligned(size: int) -> NDArray[np.uint8]:
    """Uninitialised memory, [size], from a page's start on: copies into odd places run at down to half the speed."""
    room = np.empty(size + _PAGE, np.uint8)
    start = -room.ctypes.data % _PAGE
    return room[start : start + size]


def file_of(root: Path, relative: str) -> Path:
    """The path of a file that a commit record names."""
    return root.joinpath(*relative.split("/"))


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_dead_partials(path: Path) -> None:
    """Remove temporary files that killed writers of `path` left behind; those of a writer at work stay.

    So do those that can't be told apart, on a file system without locks: nothing reads them.
    """
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
        # For writing, though nothing is written: NFS grants the lock to no other.
        with contextlib.suppress(OSError), partial.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn an OSError within into a CacheError of one line that starts with `what`."""
    try:
        yield
    except OSError as error:
        raise CacheError(f"{what}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    remedies = {
        errno.ENOSPC: "the disk is full: free some room or choose another folder, then run the same command again",
        errno.EDQUOT: "your disk quota is used up: free some room or choose another folder, then run again",
        errno.EROFS: "the file system is read-only: choose another folder",
        errno.EACCES: "permission denied: choose a folder that you may write to, or mend its permissions",
        errno.EPERM: "permission denied: choose a folder that you may write to, or mend its permissions",
        errno.ENOTDIR: "a file stands where a folder is needed: choose another path",
        errno.EMFILE: "too many open files: raise `ulimit -n`",
    }
    known = remedies.get(error.errno or 0)
    return known or f"{error.strerror or error} ({error.filename or 'no file'}): mend that and run again"


class Descriptor:
    """A file open for reading, closed when the last reference goes.

    So a thread that still reads from it keeps it open while the LRU drops it, and no number is read after its reuse.
    """

    __slots__ = ("_path", "number")

    def __init__(self, path: Path | str) -> None:
        self._path = path  # as it came: making a Path takes longer than opening the file
        self.number = -1
        try:
            self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise CacheDamage(f"{self.path.name} is missing") from error
        except OSError as error:
            raise CacheError(f"{path}: {_reason(error)}") from error

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)

    @property
    def path(self) -> Path:
        return Path(self._path)

    def size(self) -> int:
        return os.fstat(self.number).st_size

    def read_from(self, offset: int) -> bytes:
        """Everything from `offset` to the end; nothing when the file is shorter."""
        buffer = bytearray(max(self.size() - offset, 0))
        if buffer:
            self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, buffer: Any, offset: int) -> None:
        """Fill `buffer` (a contiguous array of one item or more) from `offset`, or raise CacheDamage."""
        try:
            got = preadv(self.number, (buffer,), offset)
        except OSError as error:
            raise CacheDamage(self._unreadable(offset, error)) from error
        if got != buffer.nbytes:
            self._read_rest(buffer, offset, got)

    def read_parts(self, parts: Sequence[Any], size: int, offset: int) -> None:
        """Fill several buffers of `size` bytes together, one behind the other, or raise CacheDamage."""
        try:
            got = preadv(self.number, parts, offset)
        except OSError as error:
            raise CacheDamage(self._unreadable(offset, error)) from error
        if got != size:
            for part in parts:
                self.read_into(part, offset)
                offset += part.nbytes

    def read_some(self, buffer: memoryview, offset: int) -> int:
        """Put what comes from `offset` into `buffer`; returns how many bytes, 0 at the end of the file."""
        try:
            return os.preadv(self.number, (buffer,), offset)
        except OSError as error:
            raise CacheDamage(self._unreadable(offset, error)) from error

    def _unreadable(self, offset: int, error: OSError) -> str:
        return f"{self.path.name} can't be read at byte {offset}: {error.strerror}"

    def _read_rest(self, buffer: Any, offset: int, got: int) -> None:
        """A signal or a network file system may cut a read short; only a read of nothing is the end of the file."""
        view = memoryview(buffer).cast("B")
        while got < len(view):
            more = self.read_some(view[got:], offset + got)
            if more == 0:
                raise CacheDamage(f"{self.path.name} ends at byte {offset + got}, within a record")
            got += more


def read_table(path: Path, expected: int | None = None) -> bytes:
    """Read a small file that ends in its own crc32c (4 bytes, little-endian) and return what stands before it.

    Raises:
        CacheDamage: missing, of another length than `expected` bytes of payload, or the checksum differs.
    """
    content = read_whole(path)
    cut_table(path.name, content, expected)
    return check_table(path, content)


def cut_table(name: str, content: bytes, expected: int | None = None) -> bytes:
    """`content` without the checksum at its end, unchecked; CacheDamage when its length isn't the expected one."""
    if expected is not None and len(content) != expected + CHECKSUM_BYTES:
        raise CacheDamage(f"{name} has {len(content)} bytes instead of {expected + CHECKSUM_BYTES}")
    return content[:-CHECKSUM_BYTES]


def check_table(path: Path, content: bytes) -> bytes:
    """`content` without the crc32c at its end; CacheDamage naming `path` when that differs."""
    payload, stored = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
    if checksum(payload) != stored:
        raise CacheDamage(f"{path.name}: its crc32c differs")
    return payload


def read_whole(path: Path) -> bytes:
    """The bytes of a small file; CacheDamage when it is missing or can't be read, CacheError when not opened."""
    return Descriptor(path).read_from(0)


def checksum(payload: bytes) -> bytes:
    """crc32c as it stands at the end of a file."""
    return int(crc32c(payload)).to_bytes(CHECKSUM_BYTES, "little")


def hash_file(path: Path) -> FileEntry:
    """Measure a file as a commit record states it; CacheDamage when it is missing or can't be read."""
    return hash_rest(Descriptor(path), xxhash.xxh3_128(), 0)


def hash_rest(file: Descriptor, hasher: xxhash.xxh3_128, offset: int) -> FileEntry:
    """Measure a file whose first `offset` bytes are in `hasher` already. Raises CacheDamage."""
    buffer = aligned(BLOCK).data
    while got := file.read_some(buffer, offset):
        hasher.update(buffer[:got])
        offset += got
    return FileEntry(bytes=offset, xxh3_128=hasher.hexdigest())


def allow_files(count: int) -> int:
    """Raise this process's limit of open files to `count`, as far as the system lets it; returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return max(count, _MOST_FILES)
    wanted = min(count, _MOST_FILES, count if hard == resource.RLIM_INFINITY else hard)
    if wanted <= soft:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):  # a sandbox may forbid it
        return soft
    return wanted


K = TypeVar("K")
V = TypeVar("V")


class Lru(Generic[K, V]):
    """The `capacity` most recently used values; others are made again when asked for.

    A dict keeps the order in which keys were put in. Threads may share one: at worst a value is made twice.
    """

    def __init__(self, capacity: int, make: Callable[[K], V]) -> None:
        self._capacity, self._make = capacity, make
        self._values: dict[K, V] = {}

    def __call__(self, key: K) -> V:
        values = self._values
        value = values.pop(key, None)
        if value is None:
            value = self._make(key)
            while len(values) >= self._capacity:
                values.pop(next(iter(values)), None)
        values[key] = value
        return value
