"""Single records of remote files, each by a request of its own."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.cache.files import must_exist
from pipeline.cache.remote.objects import Objects

_THREADS = 16  # requests of a process at once


class Ranges:
    """Reads parts of the files below a URL; those that are expected come side by side. Safe in threads and forks."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._expected: dict[tuple[str, int, int], Future[bytes]] = {}
        self._pool, self._owner = ThreadPoolExecutor(_THREADS, "range"), os.getpid()

    def expect(self, file: str, start: int, stop: int) -> None:
        """Start to fetch what `read` will be asked for."""
        if self._owner != os.getpid():  # the threads stayed in the process that this one was forked from
            self._expected, self._owner = {}, os.getpid()
            self._pool = ThreadPoolExecutor(_THREADS, "range")
        if (file, start, stop) not in self._expected:
            self._expected[file, start, stop] = self._pool.submit(self._objects.read, file, start, stop)

    def read(self, file: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` - 1. Raises CacheDamage: the file is missing, or shorter; StorageError."""
        expected = self._expected.pop((file, start, stop), None)
        with must_exist(file):
            if expected is not None and self._owner == os.getpid():
                return expected.result()
            return self._objects.read(file, start, stop)


class RangedFile:
    """A remote file of records; see `RecordFile`."""

    __slots__ = ("_file", "_ranges")

    def __init__(self, ranges: Ranges, file: str) -> None:
        self._ranges, self._file = ranges, file

    @property
    def path(self) -> Path:
        return Path(self._file)

    def expect(self, size: int, offset: int) -> None:
        self._ranges.expect(self._file, offset, offset + size)

    def read_parts(self, parts: Sequence[Any], size: int, offset: int) -> None:
        content = memoryview(self._ranges.read(self._file, offset, offset + size))
        for part in parts:
            target = memoryview(part).cast("B")
            target[:], content = content[: len(target)], content[len(target) :]
