"""Reading and writing the cache's files: measured as they are written, checked as they are read."""

import contextlib
import errno
import os
import resource
import stat
from collections.abc import Iterable, Iterator, Sequence
from os import preadv
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from awscrt.checksums import crc32c
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from pipeline.errors import CacheDamage, CacheError, StorageError
from pipeline.files import whole_file

CHECKSUM_BYTES = 4
BLOCK = 1 << 20  # bytes that are read or written at once
_PAGE = 4096
_LARGEST_SMALL_FILE = 256 << 20  # bytes of a header, or of a record that names 65,536 tombstones
_MAX_OPEN_FILES = 1 << 16  # a process asks for no more: a hard limit of a billion is not meant to be used


class FileEntry(BaseModel):
    """What a commit record states about one file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    bytes: int
    xxh3_128: str


def write_file(
    path: Path,
    parts: Iterable[Any],
    *,
    durable: bool = True,
    exclusive: bool = False,
    expected: FileEntry | None = None,
) -> FileEntry:
    """Write the concatenated parts (contiguous buffers) to `path` atomically, and measure them.

    Where `durable`, the content is on the disk before the file has its name. The caller makes the name durable too:
    `sync(folder)`, once for all files of a folder.

    Raises:
        FileExistsError: with `exclusive`, `path` exists; it stays as it is.
        CacheDamage: the parts are not what is `expected`; `path` stays as it is.
        OSError: disk full, read-only, ...; no temporary file stays behind.
    """
    hasher, size = xxhash.xxh3_128(), 0
    with (
        whole_file(path, durable=durable, exclusive=exclusive) as partial,
        partial.open("wb", buffering=BLOCK) as file,  # gathers small parts
    ):
        for part in parts:
            hasher.update(part)
            size += file.write(part)
        written = FileEntry(bytes=size, xxh3_128=hasher.hexdigest())
        if expected not in (None, written):
            raise CacheDamage(f"{path.name} is not what its commit record states (its xxh3-128 differs)")
    return written


def aligned(size: int) -> NDArray[np.uint8]:
    """Uninitialised memory, uint8 [size], that starts at a page: elsewhere, copies run at down to half the speed."""
    memory = np.empty(size + _PAGE, np.uint8)
    start = -memory.ctypes.data % _PAGE
    return memory[start : start + size]


def file_of(root: Path, relative: str) -> Path:
    """The path of a file that a commit record names."""
    return root.joinpath(*relative.split("/"))


@contextlib.contextmanager
def must_exist(file: str) -> Iterator[None]:
    """Turn a FileNotFoundError within into a CacheDamage: a commit record states the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise CacheDamage(f"{file} is missing") from error


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
    remedy = remedies.get(error.errno or 0)
    return remedy or f"{error.strerror or error} ({error.filename or 'no file'}): mend that and run again"


class Descriptor:
    """A file open for reading, closed when the last reference goes.

    A thread that still reads from it keeps it open while the LRU drops it, so no number is read after its reuse.
    """

    __slots__ = ("_path", "number")

    def __init__(self, path: Path | str) -> None:
        self._path = path  # as it came: making a Path takes longer than opening the file
        self.number = -1
        try:
            # A pipe without a writer would wait for one.
            self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            regular = stat.S_ISREG(os.fstat(self.number).st_mode)
        except FileNotFoundError as error:
            raise CacheDamage(f"{self.path.name} is missing") from error
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.ENODEV):  # a link to itself, a socket, no device
                raise CacheDamage(f"{self.path.name} is no regular file: {error.strerror}") from error
            raise CacheError(f"{path}: {_reason(error)}") from error
        if not regular:
            raise CacheDamage(f"{self.path.name} is no regular file")

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)

    @property
    def path(self) -> Path:
        return Path(self._path)

    def size(self) -> int:
        return os.fstat(self.number).st_size

    def expect(self, size: int, offset: int) -> None:
        """Nothing: a read comes when it is asked for."""

    def read_into(self, buffer: Any, offset: int) -> None:
        """Fill `buffer` (a contiguous array of one item or more) from `offset`, or raise CacheDamage."""
        self.read_parts((buffer,), buffer.nbytes, offset)

    def read_parts(self, parts: Sequence[Any], size: int, offset: int) -> None:
        """Fill several buffers of `size` bytes together, one behind the other, or raise CacheDamage."""
        if self.read_some(parts, offset) != size:
            for part in parts:
                self._read_in_pieces(memoryview(part).cast("B"), offset)
                offset += part.nbytes

    def read_some(self, parts: Sequence[Any], offset: int) -> int:
        """Put what one call gives from `offset` into the buffers; returns how many bytes, 0 at the end of the file.

        Raises:
            StorageError: the disk doesn't answer, which says nothing about what it holds.
        """
        try:
            return preadv(self.number, parts, offset)
        except OSError as error:
            raise StorageError(
                f"{self._path} can't be read at byte {offset}: {error.strerror}: mend the disk or network, then run "
                "again; if this file alone is bad, remove it and run `mrmae verify-cache ... --repair`"
            ) from error

    def _read_in_pieces(self, buffer: memoryview, offset: int) -> None:
        """A signal or a network file system may cut a read short; only a read of nothing is the end of the file."""
        while buffer:
            count = self.read_some((buffer,), offset)
            if count == 0:
                raise CacheDamage(f"{self.path.name} ends at byte {offset}, within a record")
            buffer, offset = buffer[count:], offset + count


def read_table(path: Path, expected: int | None = None, limit: int = _LARGEST_SMALL_FILE) -> bytes:
    """Read a small file that ends in its own crc32c (4 bytes, little-endian) and return what stands before it.

    Raises:
        CacheDamage: missing, no regular file, longer than `limit`, of another length than `expected` bytes of payload,
            or the checksum differs.
    """
    content = read_whole(path, limit if expected is None else expected + CHECKSUM_BYTES)
    payload, stored = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
    if expected is not None and len(content) != expected + CHECKSUM_BYTES:
        raise CacheDamage(f"{path.name} has {len(content)} bytes instead of {expected + CHECKSUM_BYTES}")
    if checksum(payload) != stored:
        raise CacheDamage(f"{path.name}: its crc32c differs")
    return payload


def read_whole(path: Path, limit: int = _LARGEST_SMALL_FILE) -> bytes:
    """The bytes of a small file.

    Raises:
        CacheDamage: it is missing, no regular file or longer than `limit`. CacheError: it may not be opened.
        StorageError: the disk doesn't answer.
    """
    file = Descriptor(path)
    if file.size() > limit:
        raise CacheDamage(f"{path.name} has {file.size()} bytes, at most {limit} belong there")
    buffer = bytearray(file.size())
    if buffer:
        file.read_into(memoryview(buffer), 0)
    return bytes(buffer)


def checksum(payload: bytes) -> bytes:
    """crc32c as it stands at the end of a file."""
    return int(crc32c(payload)).to_bytes(CHECKSUM_BYTES, "little")


def hash_file(path: Path) -> FileEntry:
    """Measure a file as a commit record states it; CacheDamage when it is missing or no regular file."""
    file, hasher, size = Descriptor(path), xxhash.xxh3_128(), 0
    buffer = aligned(BLOCK).data
    while count := file.read_some((buffer,), size):
        hasher.update(buffer[:count])
        size += count
    return FileEntry(bytes=size, xxh3_128=hasher.hexdigest())


def allow_files(count: int) -> int:
    """Raise this process's limit of open files to `count`, as far as the system lets it; returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return max(count, _MAX_OPEN_FILES)
    wanted = min(count, _MAX_OPEN_FILES, count if hard == resource.RLIM_INFINITY else hard)
    if wanted <= soft:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):  # a sandbox may forbid it
        return soft
    return wanted
