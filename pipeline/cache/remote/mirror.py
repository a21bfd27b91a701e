"""The local copy of one remote cache: all of its metadata, and those of its shards that are wanted.

Its folder has the form of the cache itself, so the stores read it as they read any cache. Metadata are cache.json, the
commit records and the small tables: about 60 bytes a sample. A shard's large files are fetched together. Each gets its
name when its bytes have been compared with the commit record: a file of the right size is whole. They are not synced to
the disk, since they can be fetched again. A power failure leaves such a file shorter, and so it is fetched again.
"""

import contextlib
import fcntl
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from pipeline.cache.files import (
    CHECKSUM_BYTES,
    Descriptor,
    FileEntry,
    checksum,
    file_of,
    must_exist,
    one_line,
    write_file,
)
from pipeline.cache.format.commits import Commit, commit_file, commit_path, read_commit
from pipeline.cache.format.header import FILE, CacheHeader
from pipeline.cache.format.records import RecordFile
from pipeline.cache.remote.folder import LocalFolder, holding, remove, touch
from pipeline.cache.remote.metadata import read_commit_at, read_remote_header
from pipeline.cache.remote.objects import SMALL_FILES, Objects
from pipeline.cache.remote.ranges import RangedFile, Ranges
from pipeline.cache.stores import store_of
from pipeline.errors import CacheDamage, CacheError
from pipeline.files import remove_dead_partials
from pipeline.locks import flocked

log = logging.getLogger(__name__)

_BATCH = 256  # shards whose metadata are in memory at once

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteCache:
    """Where a remote cache lies, and the local folder for its shards.

    Attributes:
        by_range: fetch single records in place of whole shards.
    """

    url: str
    local: LocalFolder
    by_range: bool = False

    def __str__(self) -> str:
        return self.url


def open_mirror(remote: RemoteCache) -> "Mirror":
    """The local copy of a remote cache, with the metadata of all shards that are committed by now; errors as above."""
    mirror = Mirror(remote, read_remote_header(Objects(remote.url)))
    mirror.fetch_metadata()
    return mirror


class Mirror:
    """Makes shards of a remote cache local. Pickles small; every method may be called in any process and thread.

    Attributes:
        root: the local folder, in the form of a cache.
    """

    def __init__(self, remote: RemoteCache, header: CacheHeader) -> None:
        self.remote, self.header, self._local = remote, header, remote.local
        # Whole shards and single records keep books of their own: one must not clear away what the other counts on.
        self._cache = header.short_name + ("-range" if remote.by_range else "")
        self.root = remote.local.path / self._cache
        self._objects, self._store = Objects(remote.url), store_of(self.root, header)
        self._ranges = Ranges(self._objects)
        self._files = functools.cache(self._files_of)
        self._large = functools.cache(self._large_files)
        self._opened: set[Path] = set()  # markers of shards that this process has opened

    def __reduce__(self) -> tuple[Any, ...]:
        return Mirror, (self.remote, self.header)

    @property
    def by_range(self) -> bool:
        """Whether each record is a request of its own."""
        return self.remote.by_range

    @property
    def advice(self) -> str:
        """What to do about a damaged record."""
        if self.by_range:
            return f"{self.remote.url} itself is damaged: mend it, by `mrmae cache-copy --full` from a sound copy"
        return f"remove {self.root} and run again; if it comes back, {self.remote.url} itself is damaged"

    def size(self, shard: int) -> int:
        """Bytes that a committed shard takes in the local folder."""
        return sum(entry.bytes for entry in self._large(shard).values())

    def size_of(self, shard: int, file: str) -> int:
        """Bytes of a file of a shard, by its commit record."""
        return self._files(shard)[file].bytes

    def open_file(self, shard: int, file: str) -> RecordFile:
        """A file of a shard that is held, or whose records are fetched one by one."""
        if self.by_range and file in self._store.record_files(shard):
            return RangedFile(self._ranges, file)
        return Descriptor(f"{self.root}/{file}")

    def metadata_size(self) -> int:
        """Bytes that the metadata take there."""
        return self._local.metadata_size(self._cache)

    @contextlib.contextmanager
    def hold(self, shard: int) -> Iterator[bool]:
        """Make a shard local and keep it so within the block.

        Yields whether a shard that this process has opened was removed since: closing it frees its bytes.

        Raises:
            CacheError: the remote files are not those that were committed; or the local folder can't take the shard.
            StorageError: the server fails.
        """
        marker = self._marker(shard)
        while True:
            with holding(marker, exclusive=False) as held:
                if held and self._is_whole(shard):
                    removed = {former for former in self._opened if not former.exists()}
                    self._opened = (self._opened - removed) | {marker}
                    touch(marker)
                    yield bool(removed)
                    return
            with self._naming(shard):
                self._local.reserve(marker, list(self._large(shard)))
                self._complete(marker, shard, wait=True)

    def fetch_ahead(self, shard: int, keep: Sequence[int]) -> bool:
        """Make a shard local without removing any of `keep`; returns whether it is there.

        False: there is no room, or another process fetches it. Errors as `hold`.
        """
        marker = self._marker(shard)
        if marker.exists() and self._is_whole(shard):
            return True
        with self._naming(shard):
            markers = [self._marker(number) for number in keep]
            reserved = self._local.reserve(marker, list(self._large(shard)), markers)
            return reserved and self._complete(marker, shard, wait=False)

    def touch(self, shards: Sequence[int]) -> None:
        """Note that these shards are wanted, so that others go first."""
        for shard in shards:
            touch(self._marker(shard))

    def fetch_metadata(self) -> None:
        """Fetch what isn't here yet of commit records and tables; one process does, the others wait for it.

        Raises:
            CacheError, StorageError: as `hold`.
        """
        with one_line(f"{self.root} can't be written"):
            self.root.mkdir(parents=True, exist_ok=True)
            with (
                FileIO(self.root / "lock", "ab") as lock,
                flocked(lock, fcntl.LOCK_EX),
                ThreadPoolExecutor(SMALL_FILES, "metadata") as pool,
            ):
                if not (self.root / FILE).exists():
                    self._keep([{FILE: self.header.to_bytes()}], pool)
                shards = range(self.header.shards)
                absent = [shard for shard in shards if not commit_path(self.root, shard).exists()]
                for start in range(0, len(absent), _BATCH):
                    self._keep(list(pool.map(self._metadata, absent[start : start + _BATCH])), pool)

    def _keep(self, batch: Sequence[Mapping[str, bytes]], pool: ThreadPoolExecutor) -> None:
        """Write metadata, several shards at once, since each file waits for the disk."""
        self._local.add_metadata(self._cache, sum(len(content) for files in batch for content in files.values()))
        for _ in pool.map(self._write, batch):
            pass

    def _write(self, files: Mapping[str, bytes]) -> None:
        """Write a shard's tables, then its commit record."""
        for file, content in files.items():
            write_file(file_of(self.root, file), [content])

    def _metadata(self, shard: int) -> dict[str, bytes]:
        """A shard's tables and its commit record, in this order; nothing where it isn't committed."""
        file, names = commit_file(shard), self._store.tables(shard)
        found = self._twice(shard, file, partial(read_commit_at, self._objects, self.header, shard))
        if found is None:
            return {}
        content, commit = found
        return {name: self._twice(shard, name, partial(self._table, name, commit)) for name in names} | {file: content}

    def _table(self, name: str, commit: Commit) -> bytes:
        """A table, compared with the commit record; one that no commit record states ends in its own checksum."""
        with must_exist("it"):
            content, entry = self._objects.read_whole(name), commit.files.get(name)
        found = FileEntry(bytes=len(content), xxh3_128=xxhash.xxh3_128_hexdigest(content))
        if found != entry if entry else checksum(content[:-CHECKSUM_BYTES]) != content[-CHECKSUM_BYTES:]:
            raise CacheDamage("its checksum differs")
        return content

    def _large_files(self, shard: int) -> dict[str, FileEntry]:
        """The files that are fetched when the shard is wanted."""
        elsewhere = {*self._store.tables(shard), *(self._store.record_files(shard) if self.by_range else ())}
        return {file: entry for file, entry in self._files(shard).items() if file not in elsewhere}

    def _files_of(self, shard: int) -> dict[str, FileEntry]:
        return read_commit(self.root, self.header, shard).files

    def _is_whole(self, shard: int) -> bool:
        return all(self._is_there(file, entry) for file, entry in self._large(shard).items())

    def _is_there(self, file: str, entry: FileEntry) -> bool:
        try:
            return file_of(self.root, file).stat().st_size == entry.bytes
        except FileNotFoundError:
            return False

    def _marker(self, shard: int) -> Path:
        return self._local.marker(self._cache, shard, self.size(shard))

    def _complete(self, marker: Path, shard: int, wait: bool) -> bool:
        """Fetch what is missing of a shard whose bytes are reserved."""
        with holding(marker, exclusive=True, wait=wait) as held:
            if not held:
                return False
            try:
                for file, entry in self._large(shard).items():
                    if not self._is_there(file, entry):
                        self._twice(shard, file, partial(self._fetch, file, entry))
            except BaseException:
                remove(marker)
                raise
            return True

    def _fetch(self, file: str, entry: FileEntry) -> None:
        path = file_of(self.root, file)
        remove_dead_partials(path)
        with must_exist("it"), contextlib.closing(self._objects.blocks(file, entry.bytes)) as blocks:
            write_file(path, blocks, durable=False, expected=entry)

    def _twice(self, shard: int, file: str, fetch: Callable[[], T]) -> T:
        """What `fetch` gives; damage is fetched once more, since it may have come on the way."""
        for attempt in (1, 2):
            try:
                return fetch()
            except CacheDamage as error:
                if attempt == 2:
                    raise CacheError(
                        f"{self.remote.url}: damage in shard {shard}: {file}: {error}, twice: mend it there, by "
                        "`mrmae cache-copy --full` from a sound copy"
                    ) from error
                log.warning("%s/%s: %s; it is fetched once more", self.remote.url, file, error)
        raise AssertionError

    def _naming(self, shard: int) -> contextlib.AbstractContextManager[None]:
        return one_line(f"{self.root}: shard {shard} can't be fetched")
