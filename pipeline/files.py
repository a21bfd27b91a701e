"""Files and folders that appear whole or not at all, and the hash that names an image file.

    with whole_file(path) as partial:
        np.save(partial, array)  # `path` appears, or is replaced, when the block ends without an error

Until then the content lies beside it as `.NAME.HOST-PID-RANDOM.partial`.
"""

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import xxhash

from pipeline.errors import ConfigError
from pipeline.locks import is_alive, taking_turns, unlocked_at_end

PARTIAL = ".partial"
_FOREIGN = 600.0  # seconds without a write, after which another host's temporary file counts as a dead writer's
_UNLOCKED = 10  # seconds that a writer of this host may take from creating its file to locking it
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV, errno.EMLINK})  # exFAT, object mounts


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
        ConfigError: `path` is a device, a pipe or a socket, such as /dev/null: a rename would replace it.
        OSError: disk full, read-only, ...; a former file stays as it is, and no temporary file stays behind.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ConfigError(f"{path} is no regular file, which it would become: choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, file = _create(path)
    try:
        with file, unlocked_at_end(file):
            yield partial
            created = os.fstat(file.fileno())
            if partial.stat().st_ino != created.st_ino:  # safetensors renames its own file, readable by its owner alone
                partial.chmod(created.st_mode & 0o777)
            if durable:
                sync(partial)
            if exclusive:
                _name_once(partial, path)
            else:
                partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _name_once(partial: Path, path: Path) -> None:
    """Give a finished file its name, or FileExistsError: a rename would replace, a link refuses."""
    try:
        path.hardlink_to(partial)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with taking_turns(path):  # where the file system has no hard links
            if path.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
            partial.replace(path)


def _partial_of(path: Path) -> Path:
    """A name that no other writer has, and that says whose it is."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")


def _host() -> str:
    """This host's name, without what would end it in a file's name."""
    return socket.gethostname().replace("-", "_").replace("/", "_").replace(".", "_")[:64]


def _create(path: Path) -> tuple[Path, FileIO]:
    """A new temporary file beside `path`. The lock on it tells `remove_dead_partials` that its writer is alive."""
    while True:
        partial = _partial_of(path)
        file = FileIO(partial, "xb")
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return partial, file
        file.close()  # removed by another process between the open and the lock


def remove_dead_partials(path: Path) -> None:
    """Remove the temporary files that killed writers of `path` left behind; those of a writer at work stay.

    A writer holds a lock on its file, which ends with its process. It may not have taken the lock yet: so a file a few
    seconds old stays while its process lives (an older one does not: a restarted container has the same numbers).
    A writer of another host is dead when it has not written for ten minutes either. On a file system without locks all
    stay: nothing reads them.
    """
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
        remove_if_dead(partial)


def clean_folder(folder: Path) -> None:
    """Remove what killed writers left in a folder of which this process is the only writer; nothing below it."""
    for partial in folder.glob(f".*{PARTIAL}"):
        if partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def _writer_of(partial: Path) -> tuple[str, str]:
    """Host and process that a temporary file's name states; empty where an earlier version named none."""
    host, _, writer = partial.name.removesuffix(PARTIAL).rpartition("-")[0].rpartition(".")[2].partition("-")
    return host, writer


def remove_if_dead(partial: Path) -> None:
    """Remove one temporary file, unless its writer is at work: see `remove_dead_partials`."""
    host, writer = _writer_of(partial)
    # Opened for writing, though nothing is written: NFS grants an exclusive lock to no other.
    with contextlib.suppress(OSError), partial.open("r+b") as file:
        age = time.time() - os.fstat(file.fileno()).st_mtime
        unlocked = age < _UNLOCKED and writer.isdecimal() and is_alive(int(writer))
        if unlocked if host == _host() else writer.isdecimal() and age < _FOREIGN:  # earlier versions named no writer
            return
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        partial.unlink()


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a UTF-8 file as `whole_file` does, and remove what killed writers of it left behind."""
    remove_dead_partials(path)
    with whole_file(path, durable=durable) as partial:
        partial.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str, *, durable: bool = False) -> None:
    """Append a line to a UTF-8 file that no other process writes; the file is made when absent.

    A last line without its end, which a writer that was killed left, is cut off first: the two would become one.

    Args:
        durable: fsync the file.

    Raises:
        OSError: disk full, ...; the file has its former lines.
    """
    with FileIO(path, "ab+") as file:
        end = _end_of_lines(file)
        file.truncate(end)
        content = memoryview(f"{line}\n".encode())
        try:
            # Unbuffered: a buffer whose write failed writes once more when it is closed, after what had come through.
            while content:
                content = content[file.write(content) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise
        if durable:
            os.fsync(file.fileno())


def _end_of_lines(file: FileIO) -> int:
    """The size of a file without a last line that has no end."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return 0
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return size
    file.seek(0)
    return file.readall().rfind(b"\n") + 1


@contextlib.contextmanager
def whole_folder(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder to fill. It is renamed to `path`, which must not exist, at the end of the block.

    Each writer has a temporary folder of its own. What killed writers of this host left is removed at the start.

    Args:
        durable: fsync every file, the folder and its name.

    Raises:
        OSError: disk full, read-only, ...; no temporary folder stays behind.
    """
    _remove_dead_folders(path)
    partial = _partial_of(path)
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


def _remove_dead_folders(path: Path) -> None:
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
        host, writer = _writer_of(partial)
        if host == _host() and writer.isdecimal() and not is_alive(int(writer)):
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
