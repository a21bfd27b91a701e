"""Is the cache what was written? Three levels: `quick` looks at structure and sizes, `full` at every byte and record,
`deep` also asks the live teacher again about a few records.

    report = verify(path, level="full", source=images)
    if not report.sound:
        repair(path, report, extract_shard)

The teacher and the images are handed in; this wing imports neither.
"""

import errno
import os
import re
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from pipeline.cache.check.report import Report
from pipeline.cache.check.values import ViewContent
from pipeline.cache.files import FileEntry, file_of, hash_file
from pipeline.cache.format.commits import Commit, commit_file, committed_shards, read_commit
from pipeline.cache.format.header import FILE, CacheHeader, read_header
from pipeline.cache.format.records import Seal
from pipeline.cache.stores import store_of
from pipeline.errors import CacheDamage, PipelineError, StorageError
from pipeline.files import PARTIAL, hash_source

Level = Literal["quick", "full", "deep"]
_COUNTS = ("committed", "records", "bytes", "tombstones")  # added up over shards
CARDS = ("README.md", ".gitattributes")  # what lies beside a cache that is handed on
_NO_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})  # the last one is a link to itself
_NAMED = 10  # damaged samples of one view that get a finding of their own


class Source(Protocol):
    """The images that a cache was extracted from, as verification needs them."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """The sample's name, as it was at extraction."""
        ...

    def read(self, index: int) -> bytes:
        """The bytes of the image file. Raises PipelineError or OSError when it can't be read."""
        ...

    def digest(self) -> str:
        """Of the ordered keys and byte lengths: what `dataset.digest` holds."""
        ...


def verify(
    path: Path,
    level: Level = "quick",
    source: Source | None = None,
    deep: Callable[[Report], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    threads: int = 1,
) -> Report:
    """Check a cache and report everything that is wrong with it.

    Args:
        source: the images; compares the dataset's digest at any level, keys and image hashes from `full` on.
        deep: compares records with the live teacher (`compare`), and adds to the report; level `deep` needs it.
        progress: called with (shards done, shards).
        threads: shards that are checked at once; from `full` on each takes a second thread, which hashes its files.

    Raises:
        CacheError: there is no cache at `path`, or a file of it may not be read.
        StorageError: the disk with the cache or the images doesn't answer.
    """
    started = time.monotonic()
    report = Report(path=str(path), level=level)
    try:
        header = read_header(path)
    except CacheDamage as error:
        report.add("header", str(error), file=FILE)
        return report
    check_all(Verifier(path, header, source, level != "quick"), report, deep, progress, threads)
    report.seconds = time.monotonic() - started
    return report


def check_all(
    verifier: "Verifier",
    report: Report,
    deep: Callable[[Report], None] | None,
    progress: Callable[[int, int], None] | None,
    threads: int,
) -> None:
    """Check the cache and then its shards, at the report's level; arguments as `verify`."""
    header = verifier.header
    report.counts.update(samples=header.count, shards=header.shards, **dict.fromkeys(_COUNTS, 0))
    if report.level == "deep" and deep is None:
        raise PipelineError("deep verification needs the images and the teacher: give --data, or use --level full")
    verifier.check_cache(report)
    committed = verifier.committed()
    verifier.add_missing(committed, report)
    for done, part in enumerate(_in_order(verifier.check_shard, committed, threads), header.shards - len(committed)):
        report.merge(part)
        if progress is not None:
            progress(done + 1, header.shards)
    foreign = any(finding.kind == "dataset" for finding in report.findings)
    if report.level == "deep" and deep is not None and not foreign:  # of other images a teacher says other things
        deep(report)


def _in_order(check: Callable[[int], Report], shards: Sequence[int], threads: int) -> Iterator[Report]:
    """What `check` finds in each shard, in their order, while it is at work on the next ones."""
    if threads == 1:
        yield from map(check, shards)
        return
    with ThreadPoolExecutor(threads) as pool:
        under_way: deque[Future[Report]] = deque()
        try:
            for shard in shards:
                under_way.append(pool.submit(check, shard))
                if len(under_way) > threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class Verifier:
    """Checks a cache, shard by shard; a thread holds one record and the small arrays of one view of one shard."""

    def __init__(self, path: Path, header: CacheHeader, source: Source | None, full: bool) -> None:
        self.path, self.header, self._source, self.full = path, header, source, full
        self.store, self._seal = store_of(path, header), Seal(header.fingerprint)

    def committed(self) -> list[int]:
        """The shards to check: those with a commit record."""
        return committed_shards(self.path, self.header)

    def check_cache(self, report: Report) -> None:
        """What concerns no shard: metadata files, the dataset as a whole, files that don't belong here."""
        for file, problem in self.store.uncovered(None, thorough=True).items():
            report.add("uncovered", f"{file} {problem}", file=file)
        if self._source is not None:
            self._check_dataset(self._source, report)
        self.check_strays(report)

    def _check_dataset(self, source: Source, report: Report) -> None:
        dataset = self.header.dataset
        if len(source) != dataset.count:
            report.add("dataset", f"the dataset has {len(source)} images, the cache was made of {dataset.count}")
        elif source.digest() != dataset.digest:
            message = "keys or sizes of the images are not those that the cache was made of (the digest differs)"
            report.add("dataset", message)
        else:
            return
        self._source = None  # joining keys one by one would only repeat it

    def check_strays(self, report: Report) -> None:
        """Files of no shard. The first number of a file's name is its shard, if it has one."""
        expected = {FILE, *CARDS, *self.store.derived(None)}
        shards: dict[int, set[str]] = {}
        for name in _files(self.path):
            number = re.search(r"\d{1,9}", name.rpartition("/")[2])
            shard = int(number[0]) if number else -1
            if 0 <= shard < self.header.shards and shard not in shards:
                shards[shard] = {commit_file(shard), *self.store.files(shard), *self.store.derived(shard)}
            if name in expected or name in shards.get(shard, ()):
                continue
            if name.endswith(PARTIAL):
                whose = "of a writer that was killed (--repair removes it), or is at work"
                report.note("partial", f"{name} is harmless: {whose}", file=name)
            else:
                report.note("stray", f"{name} is not part of the cache", file=name)

    def add_missing(self, committed: Sequence[int], report: Report) -> None:
        """Shards without a commit record: a finding for each of the first, and one for all others."""
        report.missing = np.setdiff1d(np.arange(self.header.shards), np.array(committed, np.int64)).tolist()
        for shard in report.missing[:_NAMED]:
            report.add("missing", f"shard {shard} is not extracted, or its commit record is lost", shard=shard)
        if len(report.missing) > _NAMED:
            report.add("missing", f"{len(report.missing) - _NAMED} more shards are not extracted")

    def check_shard(self, shard: int) -> Report:
        """A committed shard's record, its files' sizes, and at the higher levels every byte. Safe in threads."""
        report = Report(path=str(self.path), level="")
        try:
            commit = read_commit(self.path, self.header, shard)
        except CacheDamage as error:
            report.add("commit", str(error), shard=shard, file=commit_file(shard))
            return report
        size = sum(entry.bytes for entry in commit.files.values())
        report.counts.update(committed=1, tombstones=len(commit.tombstones), bytes=size, records=0)
        broken = self._check_sizes(shard, commit, report)
        stale = self._check_sidecars(shard, report, thorough=False)
        if self.full:
            self._check_content(shard, commit, report, broken, stale)
        return report

    def _check_sizes(self, shard: int, commit: Commit, report: Report) -> set[str]:
        """Report files that are missing, no regular files or of another length; returns their names."""
        broken = set()
        expected = set(self.store.files(shard))
        if set(commit.files) != expected:
            report.add("commit", f"shard {shard}: its commit record lists other files", shard=shard)
        for file in sorted(expected & set(commit.files)):
            if (problem := self.problem_of(file, commit.files[file].bytes)) is not None:
                broken.add(file)
                report.add("file", f"shard {shard}: {file} {problem}", shard=shard, file=file)
        return broken

    def problem_of(self, file: str, size: int) -> str | None:
        """What is wrong with a file at first sight, in words; None where it is there and has so many bytes.

        Raises:
            StorageError: the disk fails.
        """
        try:
            found = os.stat(f"{self.path}/{file}")
        except OSError as error:
            if error.errno not in _NO_FILE:
                problem = f"{self.path}/{file} can't be looked at: {error.strerror}"
                raise StorageError(f"{problem}; mend that, then run again") from error
            gone = isinstance(error, FileNotFoundError)
            return "is missing" if gone else f"can't be looked at: {error.strerror}"
        if not stat.S_ISREG(found.st_mode):
            return "is no regular file"
        return None if found.st_size == size else f"has {found.st_size} bytes instead of {size}"

    def _check_sidecars(self, shard: int, report: Report, thorough: bool) -> bool:
        """Report what no commit covers; returns whether something is wrong."""
        problems = self.store.uncovered(shard, thorough)
        for file, problem in problems.items():
            report.add("uncovered", f"shard {shard}: {file} {problem}", shard=shard, file=file)
        return bool(problems)

    def _check_content(self, shard: int, commit: Commit, report: Report, broken: set[str], stale: bool) -> None:
        """Hash every file, in a second thread, and read every record as training does."""
        with ThreadPoolExecutor(1) as second:
            sound = set(self.store.files(shard)) - broken
            files = {file: entry for file, entry in commit.files.items() if file in sound}
            hashing = second.submit(self._check_hashes, shard, files)
            for view in range(self.header.views):
                part = self._check_view(shard, view, commit, stale)
                if not part.sound and not stale and self._check_sidecars(shard, report, thorough=True):
                    part = self._check_view(shard, view, commit, fresh=True)
                report.merge(part)
            report.merge(hashing.result())

    def measure(self, file: str) -> FileEntry:
        """A file's length and hash. Raises CacheDamage: it is missing, or no regular file."""
        return hash_file(file_of(self.path, file))

    def _check_hashes(self, shard: int, files: Mapping[str, FileEntry]) -> Report:
        report = Report(path=str(self.path), level="")
        for file, entry in files.items():
            problem = "is not what was written (its xxh3-128 differs)"
            try:
                if self.measure(file) == entry:
                    continue
            except CacheDamage as error:
                problem = f"can't be checked: {error}"
            report.add("file", f"shard {shard}: {file} {problem}", shard=shard, file=file)
        return report

    def _check_view(self, shard: int, view: int, commit: Commit, fresh: bool) -> Report:
        """Each damaged record of one view, values that can't be, and images that are not those it was made of.

        `fresh` reads none of the files that no commit covers.
        """
        part = Report(path=str(self.path), level="")
        content, damaged = ViewContent(self.header.quantiser), dict[int, str]()
        span, dead = self.header.shard_range(shard), {stone.index for stone in commit.tombstones}
        try:
            shared, table = self.store.table(shard, None), self.store.table(shard, view, fresh)
            opened = self.store.open_view(shard, view, shared, table)
        except CacheDamage as error:
            part.add("file", f"shard {shard}, view {view}: {error}", shard=shard, view=view)
            return part
        for row, index in enumerate(span):
            if index in dead:
                continue
            try:
                record = opened.read(row, keep=False)
                if self._seal(index, view, record) == record.crc32c:
                    content.add(row, record)
                else:
                    damaged[row] = "its checksum differs"
            except CacheDamage as error:
                damaged[row] = str(error)
        part.counts["records"] = len(content.rows)
        self._add_samples(part, "record", shard, view, damaged)
        for problem, rows in content.impossible():
            self._add_samples(part, "values", shard, view, dict.fromkeys(rows.tolist(), problem))
        if self._source is not None and view == 0:
            self._check_images(self._source, content, shard, part)
        return part

    def _add_samples(self, part: Report, kind: str, shard: int, view: int, problems: Mapping[int, str]) -> None:
        """Add a finding for each of the first samples, and one for all others; `problems`: row → what is wrong."""
        first = self.header.shard_range(shard).start
        for row, problem in islice(problems.items(), _NAMED):
            message = f"shard {shard}, sample {first + row}, view {view}: {problem}"
            part.add(kind, message, shard=shard, sample=first + row, view=view)
        if len(problems) > _NAMED:
            message = f"shard {shard}, view {view}: {len(problems) - _NAMED} more damaged samples"
            part.add(kind, message, shard=shard, view=view)

    def _check_images(self, source: Source, content: ViewContent, shard: int, part: Report) -> None:
        problems = self._compare_images(source, content, self.header.shard_range(shard))
        for kind, index, problem in islice(problems, _NAMED):
            part.add(kind, f"shard {shard}, sample {index}: {problem}", shard=shard, sample=index)
        further = [kind for kind, _, _ in problems]
        for kind in sorted(set(further)):
            part.add(kind, f"shard {shard}: {further.count(kind)} more images like these", shard=shard)

    def _compare_images(self, source: Source, content: ViewContent, span: range) -> Iterator[tuple[str, int, str]]:
        """Compare sound records with the images that they were made of: (kind of finding, sample, problem).

        Raises:
            StorageError: the images' disk doesn't answer, which says nothing about the cache.
        """
        hashes = content.tails["source_hash"].tolist()
        for row, name, source_hash in zip(content.rows, content.keys, hashes, strict=True):
            index, key = span[row], name.decode()
            if source.key(index) != key:
                yield "source", index, f"the cache was made of '{key}', the dataset now has '{source.key(index)}' there"
                continue
            try:
                if hash_source(source.read(index)) != source_hash:
                    yield "changed", index, f"image '{key}' has changed since it was extracted"
            except StorageError:
                raise
            except (OSError, PipelineError) as error:
                yield "source", index, f"image '{key}' can't be read any more: {error}"


def _files(root: Path) -> Iterator[str]:
    """Every file under `root`, its path relative to it, with slashes."""
    for folder, _, names in os.walk(root):
        prefix = "" if folder == str(root) else Path(folder).relative_to(root).as_posix() + "/"
        yield from (prefix + name for name in names)
