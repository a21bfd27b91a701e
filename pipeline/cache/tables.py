"""The small tables of a cache's shards in a few large buffers, which forked processes share.

Python counts references inside every object, so a process that only looks at a list of keys copies its pages. The bytes
of a large buffer hold no counts: a million keys lie in memory once, however many workers read them.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np

from pipeline.cache.format.records import Store
from pipeline.errors import CacheDamage

_BUFFER = 16 << 20  # bytes; its pages are taken as they are filled
_THREADS = 8  # that wait for a network disk at once


class Tables:
    """Tables by shard and view, read-only. View None holds what all views of the shard share."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int | None], memoryview] = {}
        self._buffer, self._lock = np.empty(0, np.uint8).data, Lock()

    def get(self, shard: int, view: int | None) -> memoryview | None:
        """One table; None when it wasn't loaded."""
        return self._kept.get((shard, view))

    def load(self, store: Store, shards: Iterable[int], views: int) -> list[tuple[int, int, CacheDamage]]:
        """Read and check the tables of `shards`; returns (shard, view, problem) of the damaged ones.

        Raises:
            CacheError: a file may not be opened.
        """

        def load(shard: int) -> list[tuple[int, int, CacheDamage]]:
            damaged = []
            for view in (None, *range(views)):
                try:
                    self._keep((shard, view), store.table(shard, view))
                except CacheDamage as error:
                    damaged.append((shard, view or 0, error))
            return damaged

        with ThreadPoolExecutor(_THREADS) as pool:
            return [problem for problems in pool.map(load, shards) for problem in problems]

    def _keep(self, place: tuple[int, int | None], table: bytes) -> None:
        with self._lock:
            if len(self._buffer) < len(table):
                self._buffer = np.empty(max(_BUFFER, len(table)), np.uint8).data
            memory, self._buffer = self._buffer[: len(table)], self._buffer[len(table) :]
        memory[:] = table
        self._kept[place] = memory.toreadonly()
