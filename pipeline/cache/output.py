"""Where extraction writes a cache: a local folder, or a URL that each shard is uploaded to as soon as it is whole."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

from pipeline.cache.files import file_of, one_line
from pipeline.cache.format.commits import FOLDER, Commit, commit_file, committed_shards, shards_named
from pipeline.cache.format.header import FILE, CacheHeader, read_header
from pipeline.cache.format.records import ShardData
from pipeline.cache.remote.copying import Copying, Folder, require_writable
from pipeline.cache.remote.metadata import find_remote_header, read_commit_at
from pipeline.cache.remote.objects import SMALL_FILES, Objects
from pipeline.cache.writer import CacheWriter, create_cache, open_writer
from pipeline.errors import CacheDamage, CacheError
from pipeline.locks import FileLock

_OUTGOING = "outgoing"
_PATIENCE = 3600.0  # seconds that another process may take to create a cache


class Output(Protocol):
    """A cache that is being extracted."""

    @property
    def place(self) -> Path | str:
        """Its folder, or its URL."""
        ...

    def find(self) -> CacheHeader | None:
        """The header of the cache that is there; None where there is none."""
        ...

    def create(self, header: CacheHeader) -> None:
        """Create the cache, unless it is there. Raises CacheError where another one is."""
        ...

    def wait(self, timeout: float = _PATIENCE) -> CacheHeader:
        """The header, once another process has created the cache; `timeout` in seconds. Raises CacheError."""
        ...

    def writer(self) -> CacheWriter:
        """What writes its shards."""
        ...


def output_at(place: Path | str, local: Path) -> Output:
    """The cache at a path, or (text) at a URL; `local` is the folder for shards on their way to a URL.

    Raises:
        ConfigError: nothing can be written to such a URL.
    """
    return LocalOutput(place) if isinstance(place, Path) else RemoteOutput(place, local)


class LocalOutput:
    """A cache in a local folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def find(self) -> CacheHeader | None:
        return read_header(self.place) if (self.place / FILE).exists() else None

    def create(self, header: CacheHeader) -> None:
        create_cache(self.place, header)

    def wait(self, timeout: float = _PATIENCE) -> CacheHeader:
        return _wait(self, timeout, pause=0.1)

    def writer(self) -> CacheWriter:
        return open_writer(self.place)


class RemoteOutput:
    """A cache at a URL. A shard lies in a folder of `local` until its upload is proven."""

    def __init__(self, url: str, local: Path) -> None:
        self.place, self._objects, self._local = url, Objects(url), local
        require_writable(self._objects)

    def find(self) -> CacheHeader | None:
        return find_remote_header(self._objects)

    def create(self, header: CacheHeader) -> None:
        folder = self._folder(header)
        create_cache(folder, header)
        Copying(Folder(folder), self._objects, header, full=False).open_target()

    def wait(self, timeout: float = _PATIENCE) -> CacheHeader:
        return _wait(self, timeout, pause=2.0)

    def writer(self) -> CacheWriter:
        header = self.wait(0)
        self.create(header)  # a killed process may have written a part of what a cache begins with
        return RemoteWriter(self._objects, self._folder(header), header)

    def _folder(self, header: CacheHeader) -> Path:
        return self._local / _OUTGOING / header.short_name


def _wait(output: Output, timeout: float, pause: float) -> CacheHeader:
    """Look for a cache every `pause` seconds. Raises CacheError: there is none after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while (header := output.find()) is None:
        if time.monotonic() > deadline:
            raise CacheError(f"{output.place}: no {FILE} after {timeout:.0f} s: did the process that creates it fail?")
        time.sleep(pause)
    return header


class RemoteWriter(CacheWriter):
    """Writes shards to a local folder, uploads each with its commit record last, and removes it from the folder.

    Processes of a node share the folder. A shard whose upload was interrupted is uploaded by the next run.
    """

    def __init__(self, objects: Objects, folder: Path, header: CacheHeader) -> None:
        super().__init__(folder, header)
        self._objects = objects
        # A shard that another run left there half may have the same sizes: what is there is read.
        self._copying = Copying(Folder(folder), objects, header, full=True)
        self._uploaded = set(shards_named(objects.names(FOLDER), header))
        for shard in self._uploaded & set(committed_shards(folder, header)):
            self._remove(shard)

    def is_committed(self, shard: int) -> bool:
        """Whether the shard is finished and uploaded. Uploads it where that alone is missing."""
        with contextlib.suppress(CacheDamage):  # what is left of it is damaged: it is extracted again
            if shard not in self._uploaded and super().is_committed(shard):
                self._upload(shard)
        return shard in self._uploaded

    def write_shard(self, shard: int, data: ShardData) -> None:
        super().write_shard(shard, data)
        self._upload(shard)

    def commits(self) -> list[Commit]:
        """The commit records at the URL, of other processes' shards too. Raises CacheDamage."""
        uploaded = shards_named(self._objects.names(FOLDER), self.header)
        with ThreadPoolExecutor(SMALL_FILES, "commits") as pool:
            found = pool.map(partial(read_commit_at, self._objects, self.header), uploaded)
            return [content_and_commit[1] for content_and_commit in found if content_and_commit]

    def _upload(self, shard: int) -> None:
        """Raises CacheDamage: something arrived otherwise than it was sent."""
        with one_line(f"{self.path}: shard {shard} can't be uploaded"), FileLock(self._lock(shard), waits=True):
            # Another process may have been given the same shard, and be done with it.
            if self._objects.size(commit_file(shard)) is None:
                self._copying.copy(shard)
            self._remove(shard)
        self._uploaded.add(shard)

    def _lock(self, shard: int) -> Path:
        return self.path / f".{shard:06d}.lock"

    def _remove(self, shard: int) -> None:
        """Remove a shard from the local folder, its commit record last: where that is, more may be."""
        for file in self._store.files(shard) + self._store.derived(shard):
            file_of(self.path, file).unlink(missing_ok=True)
        self.withdraw(shard)
