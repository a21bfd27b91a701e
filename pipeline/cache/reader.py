"""Random access to the records of a cache, each checked as it is read."""

import logging
import resource
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.files import allow_files
from pipeline.cache.format.commits import committed_shards, read_commit
from pipeline.cache.format.header import CacheHeader, read_header
from pipeline.cache.format.records import LocalFiles, OpenView, Raw, Record, Seal, ShardFiles
from pipeline.cache.remote.mirror import RemoteCache, open_mirror
from pipeline.cache.stores import store_of
from pipeline.cache.tables import Tables
from pipeline.errors import CacheDamage, CacheError

log = logging.getLogger(__name__)

_MAX_OPEN_VIEWS = 128  # views of shards whose tables weren't loaded: each keeps its own, about 60 KB


class Shards(ShardFiles, Protocol):
    """Makes shards local.

    Attributes:
        root: the folder where they are read.
    """

    root: Path

    @property
    def by_range(self) -> bool:
        """Whether each record is a request of its own."""
        ...

    @property
    def advice(self) -> str:
        """What to do about a damaged record."""
        ...

    def hold(self, shard: int) -> AbstractContextManager[bool]:
        """Keep a shard's files where they are read within the block; yields whether others were removed since."""
        ...


class LocalShards(LocalFiles):
    """The shards of a local cache, which lie where they are read."""

    by_range = False

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.root = root
        self.advice = f"run `mrmae verify-cache {root} --repair`"

    def hold(self, shard: int) -> AbstractContextManager[bool]:
        return nullcontext(False)


def open_cache(place: Path | str | RemoteCache) -> "CacheReader":
    """Open a cache for reading; every commit record is read and checked, no data yet.

    Raises:
        CacheError: no cache there. CacheDamage: cache.json or a commit record is damaged.
        StorageError: a server fails.
    """
    shards: Shards = open_mirror(place) if isinstance(place, RemoteCache) else LocalShards(Path(place))
    path = shards.root
    header = read_header(path)
    committed, tombstones = np.zeros(header.shards, bool), {}
    for shard in committed_shards(path, header):
        commit = read_commit(path, header, shard)
        committed[shard] = True
        tombstones.update({stone.index: stone.error for stone in commit.tombstones})
    return CacheReader(path, header, committed, tombstones, shards)


class CacheReader:
    """Reads records by sample index and view. Pickles small, and opens its files where it is used.

    It sees the shards that were committed when it was opened. `tombstones` maps sample index → error.
    A read that finds its shard closed reads the shard's small tables first: call `load_tables` before reading at random
    from more than 128 shards.
    """

    def __init__(
        self,
        path: Path,
        header: CacheHeader,
        committed: NDArray[np.bool_],
        tombstones: dict[int, str],
        shards: Shards,
    ) -> None:
        self.path, self.header, self.tombstones, self.shards = path, header, tombstones, shards
        self._committed = committed
        self._store = store_of(path, header, shards)
        self._seal = Seal(header.fingerprint)
        self._has_summary, self._quantiser = header.summary is not None, header.quantiser
        self._has_codes = self._quantiser.name == "codes"
        self._count, self._views, self._size = header.count, header.views, header.samples_per_shard
        self._tables = Tables()
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = _MAX_OPEN_VIEWS if soft == resource.RLIM_INFINITY else soft // (2 * self._store.descriptors)
        capacity = max(1, min(_MAX_OPEN_VIEWS, limit))
        self._open = lru_cache(capacity)(self._open_view)  # the least recently used view is closed

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheReader, (self.path, self.header, self._committed, self.tombstones, self.shards)

    def __len__(self) -> int:
        return self.header.count

    @property
    def stores_images(self) -> bool:
        """Whether records carry the JPEG of their view."""
        return self._store.stores_images

    def load_tables(self, caches: int = 1) -> None:
        """Read and check the small tables of all shards now, and let as many shards stay open as the system allows.

        About 60 bytes a sample (zarr: key, box, flip, hash, checksum) or 32 (webdataset: the index). Processes that are
        forked afterwards share them; a pickled reader leaves them behind.

        Args:
            caches: how many this process reads from; they share its limit of open files, which is raised.

        Raises:
            CacheDamage: tables that differ from what was written. The others are there; of these, reads say it again.
        """
        shards = np.flatnonzero(self._committed).tolist()
        damaged = self._tables.load(self._store, shards, self._views)
        views, files = len(shards) * self._views, 2 * self._store.descriptors * caches  # half is left to others
        self._open = lru_cache(max(1, min(views, allow_files(views * files) // files)))(self._open_view)
        if damaged:
            shard, view, error = damaged[0]
            more = f" (and {len(damaged) - 1} more tables)" if len(damaged) > 1 else ""
            raise CacheDamage(self._damage(shard, shard * self._size, view, error) + more) from error

    def read(self, index: int, view: int, dequantise: bool = False, keep: bool = True) -> Record:
        """One checked record.

        Args:
            index: the sample, 0 to len - 1.
            view: 0 to header.views - 1.
            dequantise: float32 tokens and summary in place of stored ones.
            keep: arrays of the record's own. Without it, this thread's next read overwrites them.

        Raises:
            CacheDamage: the bytes are not those that were written; names shard, sample and view.
            CacheError: out of range, not extracted yet, or a tombstone.
        """
        if index in self.tombstones or not 0 <= index < self._count or not 0 <= view < self._views:
            self._refuse(index, view)
        try:
            raw = self._read_checked(index, view, keep)
        except CacheDamage as error:
            raw = self._read_again(index, view, keep, error)
        record = Record(index, view, raw, self._has_summary)
        if dequantise:
            record.tokens = self._quantiser.dequantise(record.tokens, record.scale)
            if record.summary is not None:
                summary = self.header.summary_quantiser.dequantise(record.summary, record.summary_scale)
                record.summary = summary
        return record

    def expect(self, places: Iterable[tuple[int, int]]) -> None:
        """Have the records of these samples and views fetched side by side, where each is a request of its own.

        They are to be read next. Errors as `read`, or they come with it.
        """
        if self.shards.by_range:
            for index, view in places:
                shard, row = divmod(index, self._size)
                self._open(shard, view).expect(row)

    def live_indices(self) -> NDArray[np.int64]:
        """Samples that can be read: committed and no tombstones, ascending."""
        rows = np.flatnonzero(self._committed)[:, None] * self._size + np.arange(self._size)  # [shards, samples]
        return np.setdiff1d(rows[rows < len(self)], np.fromiter(self.tombstones, np.int64), assume_unique=True)

    def missing_shards(self) -> list[int]:
        """Shards that extraction has still to finish."""
        return np.flatnonzero(~self._committed).tolist()

    def _refuse(self, index: int, view: int) -> None:
        """CacheError for a place outside, or a tombstone."""
        if not 0 <= index < self._count or not 0 <= view < self._views:
            raise CacheError(
                f"sample {index}, view {view}: {self.path} holds {len(self)} samples with {self._views} views each"
            )
        if index in self.tombstones:
            raise CacheError(
                f"sample {index} is a tombstone ({self.tombstones[index]}); take samples from live_indices()"
            )

    def _read_checked(self, index: int, view: int, keep: bool) -> Raw:
        """CacheDamage without the place, where the record isn't what was written."""
        shard, row = divmod(index, self._size)
        raw = self._open(shard, view).read(row, keep)
        if self._seal(index, view, raw) != raw.crc32c:
            raise CacheDamage("its checksum differs")
        if self._has_codes and not self._quantiser.sound(raw.tokens):
            raise CacheDamage("a token is of no cluster of the codebook")  # no loss could take it
        return raw

    def _read_again(self, index: int, view: int, keep: bool, error: CacheDamage) -> Raw:
        """A damaged record once more where it came by a request of its own: the damage may have come on the way.

        Raises:
            CacheDamage: it is local, or damaged again.
        """
        if self.shards.by_range:
            log.warning("%s: sample %d, view %d: %s; it is fetched once more", self.path, index, view, error)
            try:
                return self._read_checked(index, view, keep)
            except CacheDamage as again:
                error = again
        raise CacheDamage(self._damage(index // self._size, index, view, error)) from error

    def _open_view(self, shard: int, view: int) -> OpenView:
        if not self._committed[shard]:
            raise CacheError(
                f"shard {shard} of {self.path} is not extracted yet: finish it with `mrmae extract-teacher-features`"
            )
        shared, table = self._table(shard, None), self._table(shard, view)
        with self.shards.hold(shard) as some_removed:
            if some_removed:
                self._open.cache_clear()  # an open file keeps its bytes on the disk
            return self._store.open_view(shard, view, shared, table)

    def _table(self, shard: int, view: int | None) -> memoryview:
        loaded = self._tables.get(shard, view)
        return memoryview(self._store.table(shard, view)) if loaded is None else loaded

    def _damage(self, shard: int, index: int, view: int, error: CacheDamage) -> str:
        return f"{self.path}: damage in shard {shard}, sample {index}, view {view}: {error}; {self.shards.advice}"
