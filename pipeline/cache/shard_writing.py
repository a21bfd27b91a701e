"""Shards on their way to the disk: two written side by side while a third is filled, in memory that is used again."""

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.format.header import CacheHeader
from pipeline.cache.format.records import ShardData
from pipeline.cache.writer import CacheWriter

SHARDS = 2  # written at once; the second thread works only while the first can't keep up


class ShardArrays(NamedTuple):
    """The large arrays of one shard, as `ShardData` has them."""

    tokens: NDArray[Any]
    scale: NDArray[np.float16] | None
    attention: NDArray[np.float16] | None


class ShardBuffers:
    """The large arrays of one cache's shards, used again once a shard is written.

    Memory fresh from the kernel costs a page fault every 4 KiB, which is five times what filling it costs.
    """

    def __init__(self, header: CacheHeader) -> None:
        self._header = header
        self._free: list[ShardArrays] = []

    def take(self, samples: int) -> ShardArrays:
        """Arrays for so many samples. They may hold a former shard's content: every row must be set."""
        while self._free:
            arrays = self._free.pop()
            if len(arrays.tokens) >= samples:
                return ShardArrays(*(None if array is None else array[:samples] for array in arrays))  # type: ignore[arg-type]
        return self._fresh(samples)

    def give_back(self, data: ShardData) -> None:
        """Take back the arrays of a shard that is written."""
        self._free.append(ShardArrays(data.tokens, data.scale, data.attention))

    def _fresh(self, samples: int) -> ShardArrays:
        header = self._header
        quantiser, shape = header.quantiser, header.attention_shape
        views = samples, header.views
        return ShardArrays(
            np.empty((*views, header.rows, header.stored_dim), quantiser.dtype),
            np.empty((*views, header.rows), np.float16) if quantiser.has_scale else None,
            np.empty((*views, *shape), np.float16) if shape else None,
        )


class ShardWriting:
    """Writes shards into the caches that lack them, in threads, and commits each as soon as it is whole.

    A context manager. Leaving it waits for the shards under way, also after an error: none is left half-written.

    Args:
        writers: one a cache, all over the same samples.
    """

    def __init__(self, writers: Sequence[CacheWriter]) -> None:
        self.buffers = [ShardBuffers(writer.header) for writer in writers]
        self._writers = writers
        self._threads = ThreadPoolExecutor(SHARDS, "write-shard")
        self._running: list[Future[None]] = []

    def submit(self, shard: int, contents: Sequence[ShardData]) -> None:
        """Start writing one shard, one content a cache; waits while `SHARDS` others are under way.

        Raises:
            CacheError: another shard could not be written, or this one, as `CacheWriter.write_shard` says.
        """
        while len(self._running) >= SHARDS:
            wait(self._running, return_when=FIRST_COMPLETED)
            self.check()
        self._running.append(self._threads.submit(self._write, shard, contents))

    def check(self) -> None:
        """Raise the errors of shards that are finished by now; it does not wait."""
        for future in [future for future in self._running if future.done()]:
            self._running.remove(future)
            future.result()

    def _write(self, shard: int, contents: Sequence[ShardData]) -> None:
        for writer, buffers, content in zip(self._writers, self.buffers, contents, strict=True):
            if not writer.is_committed(shard):
                writer.clean_partial(shard)
                writer.write_shard(shard, content)
            buffers.give_back(content)

    def __enter__(self) -> "ShardWriting":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._threads.shutdown(wait=True)
        if kind is None:
            self.check()
