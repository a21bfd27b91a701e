"""A folder on a local disk that holds shards of remote caches, and never more than its limit.

The processes of a node share it. A marker file stands for each shard, `resident/000017-SIZE` in its cache's folder: it
is made before the first byte arrives, so the space is taken from then on, and it is removed after the last file. Its
time of change says when the shard was wanted last; its content lists the shard's files. A lock on it is held while the
shard is fetched or opened, and a lock on the folder while room is made.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from pipeline.cache.budget import readable
from pipeline.cache.files import file_of
from pipeline.errors import CacheError
from pipeline.files import write_text
from pipeline.locks import flocked

_RESIDENT = "resident"
_METADATA = "metadata"  # the marker of what is never removed
_PATIENCE = 600.0  # seconds that shards may stay locked: another process fetches them


@dataclass(frozen=True)
class LocalFolder:
    """Where shards of remote caches are kept, and how many bytes of them."""

    path: Path
    limit: int

    def marker(self, cache: str, shard: int, size: int) -> Path:
        """The file that stands for a shard of `size` bytes; it need not exist."""
        return self.path / cache / _RESIDENT / f"{shard:06d}-{size}"

    def metadata_size(self, cache: str) -> int:
        """Bytes that the files of a cache that stay have taken."""
        return sum(map(_size, (self.path / cache / _RESIDENT).glob(f"{_METADATA}-*")))

    def add_metadata(self, cache: str, size: int) -> None:
        """Take `size` more bytes for files of a cache that stay.

        Raises:
            CacheError: the folder can't hold them.
        """
        folder = self.path / cache / _RESIDENT
        with self.locked():
            if not self._make_room(size, keep=()):
                raise self._too_small(size)
            former = list(folder.glob(f"{_METADATA}-*"))
            taken = sum(map(_size, former))
            write_text(folder / f"{_METADATA}-{taken + size}", "")
            for marker in former:
                marker.unlink()

    def reserve(self, marker: Path, files: Sequence[str], keep: Sequence[Path] = ()) -> bool:
        """Take a shard's bytes, unless they are taken; the shards wanted longest ago make room.

        Args:
            keep: markers of shards that must stay. Returns False where there is no room without them.

        Raises:
            CacheError: the folder can't hold the shard.
        """
        deadline = time.monotonic() + _PATIENCE
        while True:
            with self.locked():
                if marker.exists():
                    return True
                if self._make_room(_size(marker), keep):
                    write_text(marker, "\n".join(files))
                    return True
            if keep:
                return False
            if time.monotonic() > deadline:
                raise self._too_small(_size(marker))
            time.sleep(0.05)  # all shards are being fetched or opened

    def _make_room(self, size: int, keep: Sequence[Path]) -> bool:
        markers = list(self.path.glob(f"*/{_RESIDENT}/[!.]*"))
        excess = sum(map(_size, markers)) + size - self.limit
        shards = [marker for marker in markers if not marker.name.startswith(_METADATA) and marker not in keep]
        for marker in sorted(shards, key=_wanted):
            if excess <= 0:
                break
            if release(marker):
                excess -= _size(marker)
        return excess <= 0

    def _too_small(self, size: int) -> CacheError:
        return CacheError(
            f"{self.path} has no room for {readable(size)} within cache.local_limit={readable(self.limit)}: give more"
        )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The one process that makes room in this folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        with FileIO(self.path / "lock", "ab") as file, flocked(file, fcntl.LOCK_EX):
            yield


@contextlib.contextmanager
def holding(marker: Path, exclusive: bool, wait: bool = True) -> Iterator[bool]:
    """Lock a shard's marker; yields whether it is there, and locked now. While it is, no process removes the shard."""
    try:
        file = FileIO(marker, "rb+")
    except FileNotFoundError:
        yield False
        return
    kind = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB)
    with file, contextlib.ExitStack() as stack:
        try:
            stack.enter_context(flocked(file, kind))
        except BlockingIOError:
            yield False
            return
        yield os.fstat(file.fileno()).st_nlink > 0


def release(marker: Path) -> bool:
    """Remove a shard that nobody fetches or opens; returns whether it is gone."""
    with holding(marker, exclusive=True, wait=False) as held:
        if held:
            remove(marker)
        return held


def remove(marker: Path) -> None:
    """Remove a shard that this process holds. Its marker goes last, so that a killed process leaves no uncounted file.

    What a reader has open stays readable; the disk has the bytes back when it is closed.
    """
    root = marker.parents[1]
    for file in marker.read_text().splitlines():
        path = file_of(root, file)
        for left in (path, *path.parent.glob(f".{path.name}.*")):  # what a killed process was writing goes as well
            left.unlink(missing_ok=True)
    marker.unlink()


def touch(marker: Path) -> None:
    """Note that a shard is wanted."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(marker)


def _size(marker: Path) -> int:
    return int(marker.name.partition("-")[2])


def _wanted(marker: Path) -> float:
    try:
        return marker.stat().st_mtime
    except FileNotFoundError:
        return 0.0
