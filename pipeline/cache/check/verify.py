"""Is the cache what was written? Three levels: `quick` looks at structure and sizes, `full` at every byte and record,
`deep` also asks the live teacher again about a few records.

    report = verify(path, level="full", source=images)
    if not report.sound:
        repair(path, report, extract_shard)

The teacher and the images are handed in; this wing imports neither.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.check.deep import Reextract, compare
from pipeline.cache.check.report import Report
from pipeline.cache.check.walk import Walker
from pipeline.cache.files import PARTIAL, FileEntry, file_of, hash_file
from pipeline.cache.format.commits import FOLDER, Commit, commit_path, read_commit
from pipeline.cache.format.header import FILE, CacheHeader, read_header
from pipeline.cache.format.records import Scan, Seal, Store, Walk
from pipeline.cache.writer import store_of
from pipeline.errors import CacheDamage, PipelineError, StorageError
from pipeline.files import hash_source

Level = Literal["quick", "full", "deep"]
_SUM_TOLERANCE = 5e-3  # of attention over tokens: float16 rounds each of them
_COUNTS = ("committed", "records", "bytes", "tombstones")  # added up over shards
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
    reextract: Reextract | None = None,
    samples: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    threads: int = 1,
) -> Report:
    """Check a cache and report everything that is wrong with it.

    Args:
        source: the images; compares the dataset's digest at any level, keys and image hashes from `full` on.
        reextract: the live teacher; needed by `deep`, which asks it about `samples` random records.
        progress: called with (shards done, shards).
        threads: shards that are checked at once; from `full` on each has a second thread, which reads tokens ahead.

    Raises:
        CacheError: there is no cache at `path`, or a file of it may not be read.
        StorageError: the disk with the images doesn't answer.
    """
    started = time.monotonic()
    report = Report(path=str(path), level=level)
    try:
        header = read_header(path)
    except CacheDamage as error:
        report.add("header", str(error), file=FILE)
        return report
    report.counts.update(samples=header.count, shards=header.shards, **dict.fromkeys(_COUNTS, 0))
    if level == "deep" and reextract is None:
        raise PipelineError("deep verification needs the images and the teacher: give --data, or use --level full")
    verifier = _Verifier(path, header, source, level != "quick")
    verifier.check_cache(report)
    for shard, part in enumerate(_in_order(verifier.check_shard, header.shards, threads)):
        report.merge(part)
        if progress is not None:
            progress(shard + 1, header.shards)
    foreign = any(finding.kind == "dataset" for finding in report.findings)
    if level == "deep" and reextract is not None and not foreign:  # of other images a teacher says other things
        compare(path, header, report, reextract, samples, seed)
    report.seconds = time.monotonic() - started
    return report


def _in_order(check: Callable[[int], Report], shards: int, threads: int) -> Iterator[Report]:
    """What `check` finds in each shard, the first first, while a few more are under way."""
    if threads == 1:
        yield from map(check, range(shards))
        return
    with ThreadPoolExecutor(threads) as pool:
        under_way: deque[Future[Report]] = deque()
        try:
            for shard in range(shards):
                under_way.append(pool.submit(check, shard))
                if len(under_way) > threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class _Verifier:
    """Checks a cache, shard by shard; a thread holds the small arrays of one view of one shard, and a few blocks."""

    def __init__(self, path: Path, header: CacheHeader, source: Source | None, full: bool) -> None:
        self._path, self._header, self._source, self._full = path, header, source, full
        self._store: Store = store_of(path, header)
        self._seal, self._own = Seal(header.fingerprint), threading.local()

    def check_cache(self, report: Report) -> None:
        """What concerns no shard: metadata files, the dataset as a whole, files that don't belong here."""
        for file, problem in self._store.uncovered(None, thorough=True).items():
            report.add("uncovered", f"{file} {problem}", file=file)
        if self._source is not None:
            self._check_dataset(self._source, report)
        self._check_strays(report)

    def _check_dataset(self, source: Source, report: Report) -> None:
        dataset = self._header.dataset
        if len(source) != dataset.count:
            report.add("dataset", f"the dataset has {len(source)} images, the cache was made of {dataset.count}")
        elif source.digest() != dataset.digest:
            message = "keys or sizes of the images are not those that the cache was made of (the digest differs)"
            report.add("dataset", message)
        else:
            return
        self._source = None  # joining keys one by one would only repeat it

    def _check_strays(self, report: Report) -> None:
        known = {f for shard in range(self._header.shards) for f in self._store.files(shard)}
        known |= {f"{FOLDER}/{commit_path(self._path, shard).name}" for shard in range(self._header.shards)} | {FILE}
        known |= {f for shard in (None, *range(self._header.shards)) for f in self._store.derived(shard)}
        for name in _files(self._path):
            if name in known:
                continue
            if name.endswith(PARTIAL):
                report.note("partial", f"{name} is what a killed writer left, or one is at work; harmless", file=name)
            else:
                report.note("stray", f"{name} is not part of the cache", file=name)

    def check_shard(self, shard: int) -> Report:
        """The shard's commit, its files' sizes, and at the higher levels every byte and record. Safe in threads."""
        report = Report(path=str(self._path), level="")
        if not commit_path(self._path, shard).is_file():
            report.add("missing", f"shard {shard} is not extracted, or its commit record is lost", shard=shard)
            return report
        try:
            commit = read_commit(self._path, self._header, shard)
        except CacheDamage as error:
            report.add("commit", str(error), shard=shard, file=f"{FOLDER}/{commit_path(self._path, shard).name}")
            return report
        size = sum(entry.bytes for entry in commit.files.values())
        report.counts.update(committed=1, tombstones=len(commit.tombstones), bytes=size, records=0)
        broken = self._check_sizes(shard, commit, report)
        stale = self._check_sidecars(shard, report, thorough=False)
        if self._full:
            self._check_records(shard, commit, report, broken, stale)
        return report

    def _check_sizes(self, shard: int, commit: Commit, report: Report) -> set[str]:
        """Report files that are missing or of another length; returns their names."""
        broken = set()
        expected = set(self._store.files(shard))
        if set(commit.files) != expected:
            report.add("commit", f"shard {shard}: its commit record lists other files", shard=shard)
        for file in sorted(expected & set(commit.files)):
            try:
                size = os.stat(f"{self._path}/{file}").st_size
                problem = f"has {size} bytes instead of {commit.files[file].bytes}"
                if size == commit.files[file].bytes:
                    continue
            except OSError as error:
                gone = isinstance(error, FileNotFoundError)
                problem = "is missing" if gone else f"can't be looked at: {error.strerror}"
            broken.add(file)
            report.add("file", f"shard {shard}: {file} {problem}", shard=shard, file=file)
        return broken

    def _check_sidecars(self, shard: int, report: Report, thorough: bool) -> bool:
        """Report what no commit covers; returns whether something is wrong."""
        problems = self._store.uncovered(shard, thorough)
        for file, problem in problems.items():
            report.add("uncovered", f"shard {shard}: {file} {problem}", shard=shard, file=file)
        return bool(problems)

    def _check_records(self, shard: int, commit: Commit, report: Report, broken: set[str], stale: bool) -> None:
        walk = Walk(self._seal, self._walker())
        for view in range(self._header.views):
            part = self._check_view(shard, view, commit, walk, stale)
            if not part.sound and not stale and self._check_sidecars(shard, report, thorough=True):
                part = self._check_view(shard, view, commit, walk, fresh=True)
            report.merge(part)
        self._check_hashes(shard, commit, report, broken, walk.seen)

    def _walker(self) -> Walker:
        """This thread's; its memory serves one shard after the other."""
        if not hasattr(self._own, "walker"):
            self._own.walker = Walker()
        walker: Walker = self._own.walker
        return walker

    def _check_hashes(
        self, shard: int, commit: Commit, report: Report, broken: set[str], seen: dict[str, FileEntry]
    ) -> None:
        for file, entry in commit.files.items():
            if file in broken:
                continue
            problem = "is not what was written (its xxh3-128 differs)"
            try:
                if (seen[file] if file in seen else hash_file(file_of(self._path, file))) == entry:
                    continue
            except CacheDamage as error:
                problem = f"can't be checked: {error}"
            report.add("file", f"shard {shard}: {file} {problem}", shard=shard, file=file)

    def _check_view(self, shard: int, view: int, commit: Commit, walk: Walk, fresh: bool) -> Report:
        """Each damaged record of one view, values that can't be, and images that are not those it was made of."""
        part = Report(path=str(self._path), level="")
        span = self._header.shard_range(shard)
        dead = {stone.index for stone in commit.tombstones}
        rows = [row for row, index in enumerate(span) if index not in dead]
        try:
            scan = self._store.scan(shard, view, rows, walk, fresh)
        except CacheDamage as error:
            part.add("file", f"shard {shard}, view {view}: {error}", shard=shard, view=view)
            return part
        part.counts["records"] = len(scan.rows)
        for row, problem in islice(scan.damaged.items(), _NAMED):
            message = f"shard {shard}, sample {span[row]}, view {view}: {problem}"
            part.add("record", message, shard=shard, sample=span[row], view=view)
        if len(scan.damaged) > _NAMED:
            message = f"shard {shard}, view {view}: {len(scan.damaged) - _NAMED} more damaged samples"
            part.add("record", message, shard=shard, view=view)
        for row, problem in _impossible(scan):
            message = f"shard {shard}, sample {span[row]}, view {view}: {problem}"
            part.add("values", message, shard=shard, sample=span[row], view=view)
        if self._source is not None and view == 0:
            problems = self._join(self._source, scan, span)
            for kind, index, problem in islice(problems, _NAMED):
                part.add(kind, f"shard {shard}, sample {index}: {problem}", shard=shard, sample=index)
            rest = [kind for kind, _, _ in problems]
            for kind in sorted(set(rest)):
                part.add(kind, f"shard {shard}: {rest.count(kind)} more images like these", shard=shard)
        return part

    def _join(self, source: Source, scan: Scan, span: range) -> Iterator[tuple[str, int, str]]:
        """Hold sound records against the images that they were made of: (kind of finding, sample, problem).

        Raises:
            StorageError: the disk doesn't answer, which says nothing about the cache.
        """
        for row, name, source_hash in zip(scan.rows, scan.keys, scan.tails["source_hash"].tolist(), strict=True):
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


def _impossible(scan: Scan) -> Iterator[tuple[int, str]]:
    """(row, what can't be) of records whose checksum is right and whose content isn't; the first few of a kind."""
    wrong: dict[str, Any] = {}
    if scan.infinite:
        wrong["tokens are not finite"] = np.isin(scan.rows, scan.infinite)
    if scan.scale is not None:
        # As integers, float16 from the smallest above 0 to the largest are 1 to 0x7BFF.
        wrong["scales are not finite and positive"] = (scan.scale.view(np.uint16) - np.uint16(1)).max(1) >= 0x7BFF
    if scan.attention is not None:
        # As integers, float16 up to 0x8000 are those that are not negative.
        positive = scan.attention.view(np.uint16).max(-1) <= 0x8000
        sums = _sums(scan.attention)
        good = positive & (sums <= 1 + _SUM_TOLERANCE)
        if sums.ndim > 1:
            # A head's row is as the teacher has it, less what it gives to prefix tokens; not all give them everything.
            wrong["a head's attention sums to more than 1, or all heads' to 0"] = ~good.all(1) | (sums.max(1) <= 0)
        else:
            wrong["attention does not sum to 1"] = ~(good & (sums >= 1 - _SUM_TOLERANCE))
    box, hflip = scan.tails["box"], scan.tails["hflip"]
    wrong["the box is empty or outside the image"] = (box[:, :2] < 0).any(1) | (box[:, 2:] < 1).any(1)
    wrong["hflip is neither 0 nor 1"] = hflip > 1
    for problem, rows in wrong.items():
        yield from ((scan.rows[at], problem) for at in np.flatnonzero(rows)[:_NAMED].tolist())


def _sums(halves: NDArray[np.float16]) -> NDArray[Any]:
    """Sums of the absolute values over the last axis, float32; at least 65536 where something is not finite.

    A float16's bits but the sign, 13 places to the left, are the float32 that is 2^112 times smaller: faster
    than numpy's own sum.
    """
    shifted = (halves.view(np.uint16) & np.uint16(0x7FFF)).astype(np.uint32) << np.uint32(13)
    sums: NDArray[Any] = (shifted.view(np.float32) @ np.ones(halves.shape[-1], np.float32)) * np.float32(2.0**112)
    return sums
