"""Locks on files, for processes that must not write one thing at once.

    lock = FileLock(folder / "run.lock")  # LockedError names the process that holds it
    ...
    lock.close()

The kernel holds the lock (POSIX, so that NFS knows it and forked workers don't inherit it) and lets go of it when the
process ends in whatever way. The file says who holds it: host, process and time.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError

log = logging.getLogger(__name__)

_BYTES = 4096  # of what a lock's file says; more is not a lock's


class LockedError(Exception):
    """Another process holds the lock; the message says which one, and since when."""


class FileLock:
    """A lock on `path`, which lies there as long as the lock is held.

    What a dead process left is taken over, and said. On a file system that has no locks, whoever wrote the file holds
    it, unless that was a process of this host that is dead.

    Args:
        waits: wait for the holder, for as long as it takes, in place of LockedError.

    Raises:
        LockedError: another process holds it.
        OSError: the file can't be written.
    """

    def __init__(self, path: Path, waits: bool = False) -> None:
        self._path, self._number, self._owner = path, -1, os.getpid()
        while self._number < 0:
            number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                self._acquire(number, waits)
            except BaseException:
                os.close(number)
                raise
        self._say_former(_read(self._number))
        facts = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(self._number, 0)
        os.pwrite(self._number, json.dumps(facts).encode(), 0)

    def _acquire(self, number: int, waits: bool) -> None:
        try:
            fcntl.lockf(number, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError) as error:
            raise LockedError(_holder(_read(number))) from error
        except OSError as error:  # a file system without locks
            holder = _read(number)
            if holder and not waits and not _is_dead(holder):
                raise LockedError(f"{_holder(holder)}, as {self._path} says: remove it if that is not so") from error
        if _is_at(number, self._path):
            self._number = number
        else:
            os.close(number)  # its last holder has removed it since it was opened

    def _say_former(self, holder: dict[str, Any]) -> None:
        if holder and (holder.get("host"), holder.get("pid")) != (socket.gethostname(), os.getpid()):
            log.info("%s was left by %s, which has ended: taken over", self._path, _holder(holder))

    def close(self) -> None:
        """Let go of the lock; twice does nothing."""
        if self._number >= 0:
            number, self._number = self._number, -1
            with contextlib.suppress(OSError):
                if os.getpid() == self._owner and _is_at(number, self._path):  # not in a forked worker
                    self._path.unlink()
            os.close(number)

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def lock_folder(folder: Path) -> FileLock:
    """Make this process the only one that writes a folder, which is made where it is missing.

    Raises:
        ConfigError: another process writes it, or it can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / "run.lock")
    except LockedError as error:
        raise ConfigError(
            f"output={folder} is being written by {error}: wait for it, stop it, or choose another output"
        ) from error
    except OSError as error:
        raise ConfigError(f"output={folder} can't be written: {error.strerror or error}") from error


@contextlib.contextmanager
def taking_turns(path: Path) -> Iterator[None]:
    """Inside, no other process that takes turns at `path` is inside; the lock lies beside it."""
    with FileLock(path.with_name(f".{path.name}.lock"), waits=True):
        yield


@contextlib.contextmanager
def flocked(file: FileIO, kind: int) -> Iterator[None]:
    """Lock an open file within the block, as `fcntl.flock` does."""
    fcntl.flock(file, kind)
    with unlocked_at_end(file):
        yield


@contextlib.contextmanager
def unlocked_at_end(file: FileIO) -> Iterator[None]:
    """Unlock a file at the end of the block.

    Closing it would not be enough: a process that is forked within the block has the file too, and so the lock.
    """
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_UN)


def is_alive(pid: int) -> bool:
    """Whether this host has such a process, and not only its end, which its parent has not taken note of yet."""
    with contextlib.suppress(OSError, IndexError):  # where there is no /proc, all that exist count as alive
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_at(number: int, path: Path) -> bool:
    try:
        found, opened = os.stat(path, follow_symlinks=False), os.fstat(number)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (opened.st_dev, opened.st_ino)


def _read(number: int) -> dict[str, Any]:
    """What the lock's file says of its holder; nothing where it is empty or no lock's."""
    try:
        facts = json.loads(os.pread(number, _BYTES, 0))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _is_dead(holder: dict[str, Any]) -> bool:
    return holder.get("host") == socket.gethostname() and not is_alive(int(holder.get("pid", 0)))


def _holder(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
