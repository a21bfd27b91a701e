"""Verifying one view of one shard of the webdataset store: every byte hashed, every record's checksum, in one pass.

A few records are read at once and walked twice, by the file's hash and by their own checksums, while the CPU's cache
holds them and a second thread reads the next.
"""

from collections.abc import Iterator
from tarfile import BLOCKSIZE

import numpy as np
from awscrt.checksums import crc32c

from pipeline.cache.check.walk import RUN
from pipeline.cache.files import FileEntry, aligned
from pipeline.cache.format.records import TAILS, Scan, Walk
from pipeline.cache.tar.view import TarView, padded
from pipeline.errors import CacheDamage

_Member = tuple[int, int, int, int, int, int, int]
"""One record: its row, where it starts and stops in the tar, and behind its own start the ends of its image and the
places of its safetensors file and of its JSON (two numbers)."""


def scan_tar(opened: TarView, view: int, rows: list[int], walk: Walk, name: str) -> Scan:
    """See `pipeline.cache.format.records.Store.scan`."""
    scanner = _Scanner(opened, view, walk, len(rows))
    members = _members(opened, rows, scanner.damaged)
    measure = scanner.walk(members)
    if measure is not None:
        walk.seen[name] = measure
    return scanner.result()


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
    for place in np.flatnonzero(tensors[:sound] != opened.layout.bytes).tolist():
        damaged[rows[place]] = opened.strange_head(rows[place])
    columns = (starts, starts + sizes, BLOCKSIZE + jpg, at, facts_at, facts_at + facts)
    return list(zip(rows[:sound], *(column[:sound].tolist() for column in columns), strict=True))


class _Scanner:
    """Walks one tar, and holds what it found: the parts of `Scan`."""

    def __init__(self, opened: TarView, view: int, walk: Walk, most: int) -> None:
        self.opened, self.layout, self.view = opened, opened.layout, view
        self.seal, self.walker = walk.seal, walk.walker
        self.damaged, self.infinite = dict[int, str](), list[int]()
        self.kept = list[tuple[int, bytes, bytes]]()  # row, key, TAIL
        self.small = np.empty((most, self.layout.small[1] - self.layout.small[0]), np.uint8)  # scale and attention

    def walk(self, members: list[_Member]) -> FileEntry | None:
        """Check every record and measure the tar; None when it can't be read whole."""
        runs = list(_runs(members))
        sizes = [run[-1][2] - run[0][1] for run in runs]
        for run, block in zip(runs, self.walker.blocks(self.opened.tar, sizes), strict=True):
            if isinstance(block, CacheDamage):
                self._one_by_one(run)
            else:
                self._check(run, block.data)  # slices of it cost half as much as an array's
        return self.walker.measure  # there, since `strict` asks for one block more

    def _one_by_one(self, run: list[_Member]) -> None:
        """The records of a run that can't be read whole."""
        for member in run:
            record = aligned(member[2] - member[1])
            try:
                self.opened.tar.read_into(record, member[1])
            except CacheDamage as error:
                self.damaged[member[0]] = str(error)
            else:
                self._check([member], record.data)

    def _check(self, run: list[_Member], block: memoryview) -> None:
        """Records that lie in a block, one behind the other."""
        layout, span, view, damaged, origin = self.layout, self.opened.span, self.view, self.damaged, run[0][1]
        head, (small, small_end), sealed = layout.head, layout.small, layout.sealed
        parse_facts, seal_head, head_bytes = self.opened.parse_facts, self.seal.head, len(head)
        kept, rest, width = self.kept, self.small.reshape(-1).data, small_end - small
        for row, start, _, image_end, tensors, facts, facts_end in run:
            if row in damaged:
                continue
            at = start - origin
            first = at + tensors
            if block[first : first + head_bytes].tobytes() != head:
                damaged[row] = self.opened.strange_head(row)
                continue
            try:
                key, tail, stated = parse_facts(row, block[at + facts : at + facts_end].tobytes())
            except CacheDamage as error:
                damaged[row] = str(error)
                continue
            crc = seal_head(span[row], view, key, tail)
            for begin, end in sealed:
                crc = crc32c(block[first + begin : first + end], crc)
            if crc32c(block[at + BLOCKSIZE : at + image_end], crc) != stated:
                damaged[row] = "its checksum differs"
                continue
            place = width * len(kept)
            rest[place : place + width] = block[first + small : first + small_end]
            kept.append((row, key, tail))
            if layout.floats:
                file = np.frombuffer(block[first : first + layout.bytes], np.uint8)
                if not np.isfinite(layout.tensors(file)[0]).all():
                    self.infinite.append(row)

    def result(self) -> Scan:
        rows, keys, tails = map(list, zip(*self.kept, strict=True)) if self.kept else ([], [], [])
        scale, attention = self.layout.stack(self.small[: len(rows)])
        packed = np.frombuffer(b"".join(tails), TAILS)
        return Scan(rows, keys, packed, scale, attention, self.infinite, self.damaged)


def _runs(members: list[_Member]) -> Iterator[list[_Member]]:
    """Neighbours that are read at once."""
    run: list[_Member] = []
    for member in members:
        run.append(member)
        if member[2] - run[0][1] >= RUN:
            yield run
            run = []
    if run:
        yield run
