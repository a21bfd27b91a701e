"""Walking a file from its first byte to its last in two threads: one reads and hashes, the caller checks what was read.

Each takes about as long as hashing alone, and leaves the interpreter to the other while it is at work.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.cache.files import BLOCK, Descriptor, FileEntry, aligned
from pipeline.errors import CacheDamage

RUN = 4 * BLOCK  # bytes that are handed over at once: with fewer, the threads' waking each other shows
_ROOMS = 2  # blocks in memory, one with the caller and one that is filled; with three the CPU's cache overflows

Block = NDArray[np.uint8] | CacheDamage  # what was read, or why it wasn't


class Walker:
    """One file at a time, for one thread; the second thread ends with the last reference."""

    def __init__(self) -> None:
        self.measure: FileEntry | None = None  # of the file that was walked last; None when not all of it was readable
        self._rooms = [aligned(0)] * _ROOMS
        self._pool = ThreadPoolExecutor(1, "walk")

    def blocks(self, file: Descriptor, sizes: Sequence[int]) -> Iterator[Block]:
        """The file from its start on in blocks of `sizes` bytes, each good until the next is asked for.

        What lies behind them is hashed as well; then `measure` is there.
        """
        free, full = SimpleQueue[int | None](), SimpleQueue[tuple[int, Block] | None]()
        for room in range(_ROOMS):
            free.put(room)
        reading = self._pool.submit(self._read, file, sizes, free, full)
        try:
            while (filled := full.get()) is not None:
                room, block = filled
                yield block
                free.put(room)
        finally:
            free.put(None)  # a caller who stops early stops the reading
        self.measure = reading.result()

    def _read(
        self,
        file: Descriptor,
        sizes: Sequence[int],
        free: "SimpleQueue[int | None]",
        full: "SimpleQueue[tuple[int, Block] | None]",
    ) -> FileEntry | None:
        hasher, offset, whole = xxhash.xxh3_128(), 0, True
        try:
            for size in sizes:
                if (room := free.get()) is None:
                    return None
                block = self._fill(room, file, offset, size)
                full.put((room, block))
                if isinstance(block, CacheDamage):
                    whole = False
                else:
                    hasher.update(block.data)  # it can't be overwritten meanwhile: only this thread does that
                offset += size
            if not whole:
                return None
            buffer = aligned(BLOCK).data
            while got := file.read_some(buffer, offset):
                hasher.update(buffer[:got])
                offset += got
            return FileEntry(bytes=offset, xxh3_128=hasher.hexdigest())
        except CacheDamage:
            return None
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
