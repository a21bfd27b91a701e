"""Verification of a cache behind a URL: each shard is fetched into a scratch folder, checked there and removed."""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.cache.check.report import Report
from pipeline.cache.check.verify import Level, Source, Verifier, check_all
from pipeline.cache.files import FileEntry, file_of, must_exist, one_line, write_file
from pipeline.cache.format.commits import commit_file
from pipeline.cache.format.header import FILE, CacheHeader
from pipeline.cache.remote.metadata import read_commit_at, read_remote_header
from pipeline.cache.remote.objects import SMALL_FILES, Objects
from pipeline.cache.writer import create_cache
from pipeline.errors import CacheDamage


def verify_remote(
    url: str,
    scratch: Path,
    level: Level,
    source: Source | None = None,
    progress: Callable[[int, int], None] | None = None,
    threads: int = 1,
) -> Report:
    """Check a cache at a URL as `verify` checks a local one; files that don't belong there are not looked for.

    `quick` asks for sizes and reads the small files alone. There is no `deep`.

    Args:
        scratch: a local folder with room for `threads` shards.

    Raises:
        CacheError: there is no cache. StorageError: the server fails.
    """
    started = time.monotonic()
    report = Report(path=url, level=level)
    objects = Objects(url)
    try:
        header = read_remote_header(objects)
    except CacheDamage as error:
        report.add("header", str(error), file=FILE)
        return report
    check_all(_RemoteVerifier(objects, scratch, header, source, level != "quick"), report, None, progress, threads)
    report.seconds = time.monotonic() - started
    return report


class _RemoteVerifier(Verifier):
    """Checks copies of the shards. Safe in threads, as its base."""

    def __init__(self, objects: Objects, scratch: Path, header: CacheHeader, source: Source | None, full: bool) -> None:
        super().__init__(scratch, header, source, full)
        create_cache(scratch, header)
        self._objects = objects
        self._measured: dict[str, FileEntry] = {}  # large files of shards that are being checked
        self._cut: dict[str, str] = {}  # those of them that ended early, and how

    def committed(self) -> list[int]:
        with ThreadPoolExecutor(SMALL_FILES, "commits") as pool:
            committed = pool.map(self._has_commit, range(self.header.shards))
        return [shard for shard, is_committed in enumerate(committed) if is_committed]

    def check_cache(self, report: Report) -> None:
        for file in self.store.derived(None):
            self._fetch(file)
        super().check_cache(report)

    def check_strays(self, report: Report) -> None:
        """Nothing: web servers give no list of their files."""

    def check_shard(self, shard: int) -> Report:
        """As its base. A damaged shard is looked at once more, since the damage may have come on the way."""
        report = self._check_once(shard)
        return report if report.sound else self._check_once(shard)

    def problem_of(self, file: str, size: int) -> str | None:
        if self.full:
            return self._cut.get(file) or super().problem_of(file, size)
        found = self._objects.size(file)
        if found is None:
            return "is missing"
        return None if found == size else f"has {found} bytes instead of {size}"

    def measure(self, file: str) -> FileEntry:
        """As its base; it was measured as it arrived."""
        return self._measured[file]

    def _check_once(self, shard: int) -> Report:
        small, large = [commit_file(shard), *self.store.derived(shard)], self.store.files(shard)
        try:
            for file in small:
                self._fetch(file)
            for file in large if self.full else ():
                self._fetch_large(file)
            return super().check_shard(shard)
        finally:
            for file in small + large:
                file_of(self.path, file).unlink(missing_ok=True)
                self._measured.pop(file, None)
                self._cut.pop(file, None)

    def _has_commit(self, shard: int) -> bool:
        try:
            return read_commit_at(self._objects, self.header, shard) is not None
        except CacheDamage:
            return True  # `check_shard` says so

    def _fetch(self, file: str) -> None:
        """A small file as it is at the URL; none where there is none."""
        path = file_of(self.path, file)
        try:
            content = self._objects.read_whole(file)
        except FileNotFoundError:
            path.unlink(missing_ok=True)
            return
        with one_line(f"{path} can't be written"):
            write_file(path, [content], durable=False)

    def _fetch_large(self, file: str) -> None:
        """A large file as it is at the URL, or as much of it as arrives; none where there is none."""
        path, size = file_of(self.path, file), self._objects.size(file)
        if size is not None:
            with one_line(f"{path} can't be written"):
                self._measured[file] = write_file(path, self._arriving(file, size), durable=False)

    def _arriving(self, file: str, size: int) -> Iterator[bytes]:
        try:
            with must_exist(file), contextlib.closing(self._objects.blocks(file, size)) as blocks:
                yield from blocks
        except CacheDamage as error:
            self._cut[file] = f"doesn't arrive whole: {error}"
