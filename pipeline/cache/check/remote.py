"""Verification of a cache behind a URL: each shard is copied into a scratch folder, checked there and removed."""

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.cache.check.report import Report
from pipeline.cache.check.verify import Level, Source, Verifier, check_all
from pipeline.cache.files import file_of
from pipeline.cache.format.commits import commit_file
from pipeline.cache.format.header import FILE, CacheHeader
from pipeline.cache.remote.copying import Copying, Folder
from pipeline.cache.remote.mirror import read_remote_header
from pipeline.cache.remote.objects import Objects
from pipeline.cache.writer import create_cache
from pipeline.errors import CacheDamage

_THREADS = 32  # that wait for small files at once


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
        self._objects, self._scratch = objects, Folder(scratch)
        self._copying = Copying(objects, self._scratch, header, full=False)

    def committed(self) -> list[int]:
        with ThreadPoolExecutor(_THREADS, "commits") as pool:
            committed = pool.map(self._has_commit, range(self.header.shards))
        return [shard for shard, is_committed in enumerate(committed) if is_committed]

    def check_cache(self, report: Report) -> None:
        for file in self.store.derived(None):
            self._fetch(file)
        super().check_cache(report)

    def check_strays(self, report: Report) -> None:
        """Nothing: web servers give no list of their files."""

    def check_shard(self, shard: int) -> Report:
        try:
            if self.full:
                self._copy(shard)
            else:
                for file in [commit_file(shard), *self.store.derived(shard)]:
                    self._fetch(file)
            return super().check_shard(shard)
        except CacheDamage as error:
            report = Report(path=self._objects.url, level="")
            report.add("file", f"shard {shard}: {error}", shard=shard)
            return report
        finally:
            for file in [commit_file(shard), *self.store.files(shard), *self.store.derived(shard)]:
                file_of(self.path, file).unlink(missing_ok=True)

    def problem_of(self, file: str, size: int) -> str | None:
        if self.full:
            return super().problem_of(file, size)
        found = self._objects.size(file)
        if found is None:
            return "is missing"
        return None if found == size else f"has {found} bytes instead of {size}"

    def _has_commit(self, shard: int) -> bool:
        try:
            return self._copying.read_commit(shard) is not None
        except CacheDamage:
            return True  # `check_shard` says so

    def _copy(self, shard: int) -> None:
        """Copy a shard; damage is looked at once more, since it may have come on the way. Raises CacheDamage."""
        with contextlib.suppress(CacheDamage):
            self._copying.copy(shard)
            return
        self._copying.copy(shard)

    def _fetch(self, file: str) -> None:
        """A small file as it is at the URL; none where there is none."""
        try:
            self._scratch.write(file, self._objects.read_whole(file))
        except FileNotFoundError:
            file_of(self.path, file).unlink(missing_ok=True)
