"""Creating a cache and writing its shards: atomically, durably, the commit record last."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.files import file_of, one_line, write_file
from pipeline.cache.format.commits import (
    FOLDER,
    Commit,
    Tombstone,
    commit_path,
    committed_shards,
    read_commit,
    write_commit,
)
from pipeline.cache.format.header import FILE, CacheHeader, match_header, read_header
from pipeline.cache.format.records import Seal, ShardData, Store
from pipeline.cache.stores import store_of
from pipeline.errors import CacheError
from pipeline.files import PARTIAL, remove_dead_partials, sync
from pipeline.locations import is_text


def create_cache(path: Path, header: CacheHeader) -> bool:
    """Create an empty cache; of processes that race, exactly one does.

    Returns:
        True if this call created it, False if the same cache was there already (`dataset.source` may differ).

    Raises:
        CacheError: another cache or other files are there, or nothing can be written.
    """
    if not header.quantiser.calibrated:
        name = header.quantiser.name
        raise CacheError(f"the {name} quantiser has no channel statistics: calibrate it before the cache is created")
    with one_line(f"{path}: the cache can't be created"):
        remove_dead_partials(path / FILE)
        if (path / FILE).is_file():
            match_header(path, read_header(path), header)
            return False
        store = store_of(path, header)
        _refuse_foreign_folder(path, store)
        store.create()
        (path / FOLDER).mkdir(parents=True, exist_ok=True)
        try:
            write_file(path / FILE, [header.to_bytes()], exclusive=True)
        except FileExistsError:
            match_header(path, read_header(path), header)
            return False
        sync(path)
        sync(path.parent)
    return True


def _refuse_foreign_folder(path: Path, store: Store) -> None:
    """Refuse to fill a folder of other files. What a killed creation left is accepted."""
    names = [file.name for file in path.iterdir()] if path.exists() else []
    foreign = [name for name in names if name not in store.entries | {FOLDER} and PARTIAL not in name]
    if foreign and not (path / FILE).is_file():
        raise CacheError(f"{path} is not empty ({foreign[0]}) and holds no cache; choose another folder")


def open_writer(path: Path) -> "CacheWriter":
    """Open an existing cache for writing. Any number of processes may, each for shards of its own."""
    return CacheWriter(path, read_header(path))


class CacheWriter:
    """Writes whole shards. Writing one shard twice, even at once, is harmless: its bytes don't depend on who writes."""

    def __init__(self, path: Path, header: CacheHeader) -> None:
        self.path, self.header = path, header
        self._store = store_of(path, header)
        self._seal = Seal(header.fingerprint)

    def is_committed(self, shard: int) -> bool:
        """Whether the shard is finished. Raises CacheDamage when its commit record is damaged."""
        if not commit_path(self.path, shard).is_file():
            return False
        read_commit(self.path, self.header, shard)
        return True

    def clean_partial(self, shard: int) -> None:
        """Remove what a killed writer of an uncommitted shard left behind."""
        if commit_path(self.path, shard).is_file():
            return
        with one_line(f"{self.path}: shard {shard} can't be cleaned"):
            files = [file_of(self.path, file) for file in self._store.files(shard) + self._store.derived(shard)]
            for file in [*files, commit_path(self.path, shard)]:
                remove_dead_partials(file)

    def write_shard(self, shard: int, data: ShardData) -> None:
        """Write one shard and commit it. In `data`, rows of tombstones are zeroed and unwanted images dropped.

        Raises:
            CacheError: `data` doesn't fit the header, or the disk doesn't take it.
        """
        _check(self.header, shard, data, self._store.stores_images)
        if not self._store.stores_images:
            data.images = None
        _clear_tombstones(self.header.shard_range(shard), data)
        with one_line(f"{self.path}: shard {shard} can't be written"):
            files = self._store.write(shard, data, self._seal)
            write_commit(self.path, self._commit(shard, data, files))

    def withdraw(self, shard: int) -> None:
        """Take back a commit, so that the shard counts as unwritten; the first step of its repair."""
        with one_line(f"{self.path}: shard {shard} can't be withdrawn"), contextlib.suppress(FileNotFoundError):
            commit = commit_path(self.path, shard)
            commit.rmdir() if commit.is_dir() and not commit.is_symlink() else commit.unlink()
            sync(commit_path(self.path, shard).parent)

    def commits(self) -> list[Commit]:
        """The commit records of the shards that are finished. Raises CacheDamage."""
        return [read_commit(self.path, self.header, shard) for shard in committed_shards(self.path, self.header)]

    def _commit(self, shard: int, data: ShardData, files: dict[str, Any]) -> Commit:
        span = self.header.shard_range(shard)
        stones = [
            Tombstone(index=index, key=data.keys[index - span.start], error=error)
            for index, error in sorted(data.tombstones.items())
        ]
        return Commit(
            shard=shard,
            fingerprint=self.header.fingerprint,
            count=len(span),
            files=files,
            tombstones=stones,
            fidelity=data.fidelity,
            times=data.times,
        )


def _check(header: CacheHeader, shard: int, data: ShardData, stores_images: bool) -> None:
    span = header.shard_range(shard)
    n, V, R, D = len(span), header.views, header.rows, header.stored_dim
    attention = header.attention_shape
    expected: dict[str, tuple[Any, tuple[int, ...] | None, Any]] = {
        "tokens": (data.tokens, (n, V, R, D), header.quantiser.dtype),
        "scale": (data.scale, (n, V, R) if header.quantiser.has_scale else None, np.float16),
        "attention": (data.attention, None if attention is None else (n, V, *attention), np.float16),
        "box": (data.box, (n, V, 4), np.int32),
        "hflip": (data.hflip, (n, V), np.uint8),
        "source_hash": (data.source_hash, (n,), np.uint64),
    }
    for name, (array, shape, dtype) in expected.items():
        found = None if array is None else array.shape
        if found != shape or (array is not None and array.dtype != dtype):
            kind = "" if array is None else f"{array.dtype} "
            raise CacheError(f"shard {shard}: {name} is {kind}{found}, this cache wants {np.dtype(dtype)} {shape}")
    if len(data.keys) != n or any(index not in span for index in data.tombstones):
        raise CacheError(f"shard {shard}: {len(data.keys)} keys or a tombstone don't fit its {n} samples")
    for index, key in zip(span, data.keys, strict=True):
        if not is_text(key):
            raise CacheError(f"sample {index}: the key {key!a} is not valid Unicode; rename the file")
        images = data.images[index - span.start] if data.images is not None else None
        if stores_images and index not in data.tombstones and (images is None or len(images) != V):
            raise CacheError(f"sample {index}: this cache stores {V} images a sample, {len(images or [])} were given")


def _clear_tombstones(span: range, data: ShardData) -> None:
    for index in data.tombstones:
        for array in (data.tokens, data.scale, data.attention, data.box, data.hflip, data.source_hash):
            if array is not None:
                array[index - span.start] = 0
