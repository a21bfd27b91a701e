"""Verifying one view of one shard of the webdataset store: every byte hashed, every record's checksum, in one pass.

A few records are read at once and walked twice, by the file's hash and by their own checksums, while the CPU's cache
holds them.
"""

from collections.abc import Iterator
from tarfile import BLOCKSIZE
from typing import Any, NamedTuple

import numpy as np
import xxhash
from awscrt.checksums import crc32c
from numpy.typing import NDArray

from pipeline.cache.base import TAILS, Scan, Seal
from pipeline.cache.files import BLOCK, Descriptor, FileEntry, aligned
from pipeline.cache.tar_view import TarView, padded
from pipeline.errors import CacheDamage


class _Member(NamedTuple):
    """Where one record lies: in the tar, and its parts behind its own start."""

    row: int
    start: int
    stop: int
    image: slice
    tensors: int
    facts: slice


def scan_tar(opened: TarView, view: int, rows: list[int], seal: Seal, seen: dict[str, FileEntry], name: str) -> Scan:
    """See `pipeline.cache.base.Store.scan`."""
    layout, damaged = opened.layout, dict[int, str]()
    kept, keys, tails, tensors, infinite = [], [], [], [], []
    for member, record in _records(opened, _members(opened, rows, damaged), seen, name, damaged):
        row, file = member.row, record[member.tensors : member.tensors + layout.bytes]
        try:
            opened.check_head(row, file[: len(layout.head)])
            key, tail, stated = opened.parse_facts(row, record[member.facts].tobytes())
        except CacheDamage as error:
            damaged[row] = str(error)
            continue
        crc = seal.head(opened.span[row], view, key, tail)
        for part in layout.sealed:
            crc = crc32c(file[part], crc)
        if crc32c(record[member.image], crc) != stated:
            damaged[row] = "its checksum differs"
            continue
        kept.append(row)
        keys.append(key)
        tails.append(tail)
        tensors.append(file[layout.small].tobytes())
        if layout.floats and not np.isfinite(layout.tensors(file)[0]).all():
            infinite.append(row)
    scale, attention = layout.stack(tensors)
    return Scan(kept, keys, np.frombuffer(b"".join(tails), TAILS), scale, attention, infinite, damaged)


def _members(opened: TarView, rows: list[int], damaged: dict[int, str]) -> list[_Member]:
    """The records of `rows` as far as they lie one behind the other; others go into `damaged`."""
    table = opened.rows[np.array(rows, np.intp)]
    starts, (jpg, tensors, facts) = table[:, 0], table[:, 1:].T
    at = 2 * BLOCKSIZE + padded(jpg)
    facts_at = at + padded(tensors) + BLOCKSIZE
    sizes = facts_at + padded(facts)
    expected = np.cumsum(sizes) - sizes
    sound = int(np.argmin([*(starts == expected), False]))
    for row, start in zip(rows[sound:], starts[sound:].tolist(), strict=True):
        misplaced = f"the index of {opened.tar.path.name} places {opened.span[row]:09d} at byte {start}"
        damaged[row] = misplaced if start >= 0 else opened.absence(row)
    columns = [column[:sound].tolist() for column in (starts, sizes, jpg, at, tensors, facts_at, facts)]
    members = []
    for row, start, size, image, first, length, last, text in zip(rows, *columns, strict=False):
        if length != opened.layout.bytes:
            damaged[row] = opened.strange_head(row)
        place = slice(BLOCKSIZE, BLOCKSIZE + image)
        members.append(_Member(row, start, start + size, place, first, slice(last, last + text)))
    return members


def _records(
    opened: TarView, members: list[_Member], seen: dict[str, FileEntry], name: str, damaged: dict[int, str]
) -> Iterator[tuple[_Member, Any]]:
    """Each record's bytes, overwritten by later ones; those that can't be read go into `damaged`."""
    tar, hasher, room, whole, end = opened.tar, xxhash.xxh3_128(), _Block(), True, 0
    for run in _runs(members):
        start, end = run[0].start, run[-1].stop
        try:
            content: Any = room.fill(tar, start, end - start)
        except CacheDamage:
            whole = False
            yield from _one_by_one(opened, run, room, damaged)
            continue
        for member in run:
            record = content[member.start - start : member.stop - start]
            hasher.update(record)
            if member.row not in damaged:
                yield member, record
    if whole:
        buffer = aligned(BLOCK).data
        while got := tar.read_some(buffer, end):
            hasher.update(buffer[:got])
            end += got
        seen[name] = FileEntry(bytes=end, xxh3_128=hasher.hexdigest())


def _runs(members: list[_Member]) -> Iterator[list[_Member]]:
    """Neighbours that are read at once."""
    run: list[_Member] = []
    for member in members:
        run.append(member)
        if member.stop - run[0].start >= BLOCK:
            yield run
            run = []
    if run:
        yield run


def _one_by_one(
    opened: TarView, run: list[_Member], room: "_Block", damaged: dict[int, str]
) -> Iterator[tuple[_Member, NDArray[np.uint8]]]:
    """The records of a run that can't be read whole."""
    for member in run:
        try:
            record = room.fill(opened.tar, member.start, member.facts.stop)
        except CacheDamage as error:
            damaged[member.row] = str(error)
        else:
            if member.row not in damaged:
                yield member, record


class _Block:
    """Memory that grows to the largest run."""

    def __init__(self) -> None:
        self._content = aligned(BLOCK)

    def fill(self, tar: Descriptor, offset: int, size: int) -> NDArray[np.uint8]:
        """`size` bytes of `tar` from `offset`, until the next call. Raises CacheDamage."""
        if len(self._content) < size:
            self._content = aligned(size + size // 4)
        content = self._content[:size]
        tar.read_into(content, offset)
        return content
