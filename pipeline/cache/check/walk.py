"""Walking a file from its first byte to its last: it is read ahead in a second thread, and hashed block by block.

Reading, be it from a disk or out of the system's page cache, takes about as long as the checksums over what was read,
and leaves the interpreter to the caller meanwhile.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.cache.files import BLOCK, Descriptor, FileEntry, aligned, hash_rest
from pipeline.errors import CacheDamage

RUN = 3 * BLOCK  # bytes that are handed over at once: with fewer, the threads' waking each other shows
_ROOMS = 2  # blocks in memory, one with the caller and one that is filled; with three the CPU's cache overflows

Block = NDArray[np.uint8] | CacheDamage  # what was read, or why it wasn't
_Free = SimpleQueue[int | None]  # rooms to be filled; None: no more
_Full = SimpleQueue[tuple[int, Block] | None]  # rooms with what is in them; None: nothing more will come


class Walker:
    """One file at a time, for one thread; the second thread ends with the last reference."""

    def __init__(self) -> None:
        self.measure: FileEntry | None = None  # of the file that was walked last; None when not all of it was readable
        self._rooms = [aligned(0)] * _ROOMS
        self._pool = ThreadPoolExecutor(1, "walk")

    def blocks(self, file: Descriptor, sizes: Sequence[int]) -> Iterator[Block]:
        """The file from its start on in blocks of `sizes` bytes, each good until the next is asked for.

        Asked for one more, it hashes what lies behind them, and ends; then `measure` is there.
        """
        self.measure, hasher, whole = None, xxhash.xxh3_128(), True
        free, full = _Free(), _Full()
        for room in range(_ROOMS):
            free.put(room)
        try:
            reading = self._pool.submit(self._read, file, sizes, free, full)
            while (filled := full.get()) is not None:
                room, block = filled
                if isinstance(block, CacheDamage):
                    whole = False
                else:
                    hasher.update(block.data)
                yield block
                free.put(room)
        finally:
            free.put(None)  # a caller who stops early stops the reading
        reading.result()  # raises what went wrong in it
        if whole:
            self.measure = hash_rest(file, hasher, sum(sizes))

    def _read(self, file: Descriptor, sizes: Sequence[int], free: _Free, full: _Full) -> None:
        offset = 0
        try:
            for size in sizes:
                if (room := free.get()) is None:
                    return
                full.put((room, self._fill(room, file, offset, size)))
                offset += size
        finally:
            full.put(None)

    def _fill(self, room: int, file: Descriptor, offset: int, size: int) -> Block:
        if len(self._rooms[room]) < size:
            self._rooms[room] = aligned(size + size // 4)
        block = self._rooms[room][:size]
        try:
            file.read_into(block, offset)
        except CacheDamage as error:
            return error
        return block
