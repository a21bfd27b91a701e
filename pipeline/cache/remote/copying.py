"""Whole caches from one place to another: committed shards alone, each file compared with its commit record.

A shard's files are written first, and its commit record last, so that a copy that was stopped is a cache with fewer
shards, and goes on from there.
"""

import contextlib
from collections.abc import Generator, Iterable
from pathlib import Path

import xxhash

from pipeline.cache.files import (
    BLOCK,
    CHECKSUM_BYTES,
    FileEntry,
    checksum,
    file_of,
    must_exist,
    one_line,
    read_whole,
    write_file,
)
from pipeline.cache.format.commits import Commit, commit_file
from pipeline.cache.format.header import FILE, CacheHeader
from pipeline.cache.remote.metadata import read_commit_at
from pipeline.cache.remote.objects import Objects
from pipeline.cache.stores import store_of
from pipeline.errors import CacheDamage, CacheError, ConfigError
from pipeline.files import remove_dead_partials, sync


class Folder:
    """A local folder, as a place of a cache."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def read_whole(self, name: str) -> bytes:
        if not file_of(self.root, name).exists():
            raise FileNotFoundError(name)
        return read_whole(file_of(self.root, name))

    def blocks(self, name: str, size: int) -> Generator[bytes, None, None]:
        with file_of(self.root, name).open("rb") as file:
            while block := file.read(BLOCK):
                yield block

    def size(self, name: str) -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return file_of(self.root, name).stat().st_size
        return None

    def write(self, name: str, content: bytes) -> None:
        self.write_parts(name, [content], None)

    def write_parts(self, name: str, parts: Iterable[bytes], entry: FileEntry | None) -> None:
        """Write a file durably. Raises CacheDamage when the parts are not what `entry` states."""
        path = file_of(self.root, name)
        with one_line(f"{path} can't be written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_dead_partials(path)
            write_file(path, parts, expected=entry)
            sync(path.parent)

    def remove(self, name: str) -> None:
        file_of(self.root, name).unlink(missing_ok=True)


def require_writable(place: Folder | Objects) -> None:
    """Raises ConfigError: files can't be written there."""
    if isinstance(place, Objects) and not place.takes_files:
        raise ConfigError(
            f"{place} can't be written to by this command: s3:// and gs:// can; for the hub write to a local folder, "
            "then run `hf upload-large-folder OWNER/NAME FOLDER --repo-type dataset`"
        )


class Copying:
    """Copies shards of one cache. Safe in threads, each with shards of its own.

    Args:
        full: read what the target has already, and replace what is damaged.
    """

    def __init__(self, source: Folder | Objects, target: Folder | Objects, header: CacheHeader, full: bool) -> None:
        self._source, self._target, self._header, self._full = source, target, header, full
        self._store = store_of(Path(), header)  # for the names of files alone

    def open_target(self) -> None:
        """Write what must be there before the first shard.

        Raises:
            CacheError: the target holds another cache.
        """
        content = self._header.to_bytes()
        try:
            found = self._target.read_whole(FILE)
        except FileNotFoundError:
            self._target.write(FILE, content)
        else:
            if found != content:
                raise CacheError(f"{self._target} holds another cache: choose another place, or remove that one")
        for file in self._store.derived(None):
            with must_exist(file):
                expected = self._source.read_whole(file)
            if self._target.size(file) != len(expected) or self._target.read_whole(file) != expected:
                self._target.write(file, expected)

    def copy(self, shard: int, dry: bool = False) -> tuple[int, Commit] | None:
        """Copy what the target lacks of a shard; returns the bytes, and its commit record.

        None where the source hasn't committed it. With `dry`, nothing is written.

        Raises:
            CacheDamage: the source, or what arrived, is not what the commit record states.
        """
        found = read_commit_at(self._source, self._header, shard)
        if found is None:
            return None
        content, commit = found
        entries = {file: commit.files.get(file) for file in [*commit.files, *self._store.derived(shard)]}
        missing = {file: entry for file, entry in entries.items() if not self._is_there(file, entry)}
        if not missing and self._is_same(commit_file(shard), content):
            return 0, commit
        sizes = (entry.bytes if entry else 0 for entry in missing.values())
        if not dry:
            self._target.remove(commit_file(shard))
            for file, entry in missing.items():
                with must_exist(file):
                    self._copy_file(file, entry)
            self._target.write(commit_file(shard), content)
        return len(content) + sum(sizes), commit

    def _is_same(self, file: str, content: bytes) -> bool:
        try:
            return self._target.read_whole(file) == content
        except FileNotFoundError:
            return False

    def _is_there(self, file: str, entry: FileEntry | None) -> bool:
        if entry is None:
            with must_exist(file):
                return self._is_same(file, self._source.read_whole(file))
        if self._target.size(file) != entry.bytes:
            return False
        return not self._full or self._measure(self._target, file, entry) == entry

    def _copy_file(self, file: str, entry: FileEntry | None) -> None:
        if entry is None:  # of the files that no commit record states, each shard's ends in its own checksum
            content = self._source.read_whole(file)
            if checksum(content[:-CHECKSUM_BYTES]) != content[-CHECKSUM_BYTES:]:
                raise CacheDamage(f"{file}: its checksum differs")
            self._target.write(file, content)
        elif isinstance(self._target, Folder):
            with contextlib.closing(self._blocks(file, entry.bytes)) as blocks:
                self._target.write_parts(file, blocks, entry)
        else:
            assert isinstance(self._source, Folder)
            if self._measure(self._source, file, entry) != entry:
                raise CacheDamage(f"{file} is not what its commit record states")
            self._target.upload(file, file_of(self._source.root, file))
            if self._measure(self._target, file, entry) != entry:
                self._target.remove(file)  # else its size would let it pass next time
                raise CacheDamage(f"{file} arrived otherwise than it was sent")

    def _blocks(self, file: str, size: int) -> Generator[bytes, None, None]:
        """The source's blocks; a missing file is the source's damage, and not the target's."""
        with must_exist(file), contextlib.closing(self._source.blocks(file, size)) as blocks:
            yield from blocks

    def _measure(self, place: Folder | Objects, file: str, entry: FileEntry) -> FileEntry:
        """What a place has of a file, as a commit record states it."""
        hasher, size = xxhash.xxh3_128(), 0
        with contextlib.suppress(CacheDamage), contextlib.closing(place.blocks(file, entry.bytes)) as blocks:
            for block in blocks:
                hasher.update(block)
                size += len(block)
        return FileEntry(bytes=size, xxh3_128=hasher.hexdigest())
