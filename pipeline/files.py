"""Files and folders that appear whole or not at all, and the hash that names an image file.

    with whole_file(path) as partial:
        np.save(partial, array)  # `path` appears, or is replaced, when the block ends without an error

Until then the content lies beside it as `.NAME.RANDOM.partial`.
"""

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import xxhash

PARTIAL = ".partial"


@contextlib.contextmanager
def whole_file(path: Path, *, durable: bool = False, exclusive: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to. The file is renamed to `path` when the block ends without an error.

    It gets the mode that the umask, or the folder's default ACL, gives a new file. The folder is made when absent.
    Any number of processes may write the same `path`: each has a temporary file of its own, and the last rename counts.

    Args:
        durable: fsync the content before the rename. `sync(path.parent)` afterwards makes the name durable too.
        exclusive: refuse to replace a file.

    Raises:
        FileExistsError: with `exclusive`, `path` exists; it stays as it is.
        OSError: disk full, read-only, ...; a former file stays as it is, and no temporary file stays behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, file = _create(path)
    try:
        with file:
            yield partial
            created = os.fstat(file.fileno())
            if partial.stat().st_ino != created.st_ino:  # safetensors renames its own file, readable by its owner alone
                partial.chmod(created.st_mode & 0o777)
            if durable:
                sync(partial)
            if exclusive:
                path.hardlink_to(partial)  # a rename would replace, a link refuses
            else:
                partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _create(path: Path) -> tuple[Path, FileIO]:
    """A new temporary file beside `path`. The lock on it tells `remove_dead_partials` that its writer is alive."""
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
        file = FileIO(partial, "xb")
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return partial, file
        file.close()  # removed by another process between the open and the lock


def remove_dead_partials(path: Path) -> None:
    """Remove the temporary files that killed writers of `path` left behind; those of a writer at work stay.

    On a file system without locks they can't be told apart, and all stay: nothing reads them.
    """
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
        # Opened for writing, though nothing is written: NFS grants an exclusive lock to no other.
        with contextlib.suppress(OSError), partial.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a UTF-8 file as `whole_file` does, and remove what killed writers of it left behind."""
    remove_dead_partials(path)
    with whole_file(path, durable=durable) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_folder(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder to fill. It is renamed to `path`, which must not exist, at the end of the block.

    One process at a time may write a folder: what a killed writer left is removed at the start.

    Args:
        durable: fsync every file, the folder and its name.

    Raises:
        OSError: disk full, read-only, ...; no temporary folder stays behind.
    """
    partial = path.with_name(f".{path.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for content in [*partial.iterdir(), partial] if durable else []:
            sync(content)
        partial.rename(path)
        if durable:
            sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Make the bytes of a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_source(content: bytes) -> int:
    """xxh3-64 of an image file: what a cache's `source_hash` holds."""
    return xxhash.xxh3_64_intdigest(content)
