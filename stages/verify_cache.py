"""Check that a cache is what was extracted.

Exit code 0: it is sound; 1: it is damaged or unfinished; 2: it could not be checked.

    mrmae verify-cache /data/clip
    mrmae verify-cache /data/clip --level deep --repair

    quick   structure, counts and sizes
    full    every byte and every record, and the source images where they can be found
    deep    also renders some records again and asks the live teacher

Reads the cache at PATH. Writes nothing without --repair, which extracts damaged shards again, and shards whose lost
images can be read now. Costs seconds (quick), one reading of the cache (full), or a few forward passes more (deep).
PATH may be a URL, whose shards are read one by one and not repaired.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from pydantic import Field

from pipeline.assembly.extraction import Extractor
from pipeline.assembly.teachers import teacher_of_cache
from pipeline.cache import (
    CacheHeader,
    Reextracted,
    Repair,
    Report,
    ShardData,
    compare,
    read_commit,
    read_header,
    remove_left_overs,
    repair,
    revivable,
    verify,
    verify_remote,
)
from pipeline.cache.files import one_line
from pipeline.cache.remote.metadata import read_remote_header
from pipeline.cache.remote.objects import Objects
from pipeline.config import Config, LocationField
from pipeline.configs.cache import default_local
from pipeline.configs.data import ViewConfig
from pipeline.data.decoding import decode
from pipeline.data.images import ImageSource, open_images
from pipeline.data.rendering import preprocessing
from pipeline.errors import CacheDamage, CacheError, ConfigError, DataError
from pipeline.locations import is_url
from pipeline.ownership import stage
from pipeline.progress import Progress
from pipeline.teachers import Teacher

log = logging.getLogger(__name__)


class VerifyConfig(Config):
    """The options of `verify-cache`."""

    path: LocationField
    level: Literal["quick", "full", "deep"] = "full"
    data: str | None = None  # where the images lie now; default: where they were extracted from
    weights: str | None = None  # of the teacher, for deep and repair
    samples: int = Field(64, ge=1)  # records that deep computes again
    repair: bool = False  # extract again what is damaged, or lost images that can be read by now
    workers: int = Field(2, ge=0)
    threads: int | None = Field(None, ge=1)  # shards that are checked at once; None: one for two cores, at most 4


class Verification:
    """What was found, what was mended, and whether the images took part."""

    def __init__(self, report: Report, mended: Repair | None, images: str) -> None:
        self.report, self.mended, self.images = report, mended, images

    @property
    def sound(self) -> bool:
        return self.report.sound

    def to_json(self) -> dict[str, Any]:
        mended = {"shards": self.mended.shards, "files": self.mended.files} if self.mended else None
        return {**self.report.to_json(), "images": self.images, "repaired": mended}

    def to_text(self) -> str:
        report = self.report
        lines = [f"{finding.kind:<10} {finding.message}" for finding in [*report.findings, *report.notes]]
        if self.mended:
            lines.append(f"repaired   shards {self.mended.shards}, files {self.mended.files}")
        counts = ", ".join(f"{count} {name}" for name, count in report.counts.items())
        figures = ", ".join(f"{name} {value:.5g}" for name, value in report.figures.items())
        lines.append(f"{report.path}: {self._verdict()} at level {report.level}; {counts}; images {self.images}")
        return "\n".join([*lines, figures] if figures else lines)

    def _verdict(self) -> str:
        report = self.report
        mend = "copy it: --repair" if is_url(report.path) else "--repair"
        if report.unfinished:
            repair = "" if is_url(report.path) else f", or `mrmae verify-cache {report.path} --repair`"
            return (
                f"unfinished, {len(report.missing)} of {report.counts['shards']} shards are missing (`mrmae extract-"
                f"teacher-features` as before goes on{repair}), the rest sound"
            )
        return "sound" if self.sound else f"DAMAGED, {len(report.findings)} findings ({mend} mends what it can)"


@stage
def run(config: VerifyConfig) -> Verification:
    """Verify, and after a repair verify again.

    Raises:
        CacheError: there is no cache, or it can't be repaired from these images.
        DataError, TeacherError: deep or repair lack the images or the teacher. StorageError: a disk doesn't answer.
    """
    path = config.path
    if isinstance(path, str):
        return _verify_url(config, path)
    source, images = _images(config, functools.partial(read_header, path))
    report = _verify(config, path, source)
    mended = None
    revived = _revivable(path, report, source) if config.repair else []
    if config.repair and (revived or not report.sound):
        _check_dataset(config, report)
        header = read_header(path)
        extractor = functools.cache(
            lambda: _extractor(config, path, header, source)
        )  # what is rebuilt needs no teacher

        def extract_shard(shard: int) -> ShardData:
            return next(iter(extractor().shards([header], [shard])))[1][0]

        mended = repair(path, report, extract_shard, revived)
        report = _verify(config, path, source)
    if config.repair:
        remove_left_overs(path, report)
    return Verification(report, mended, images)


def _verify_url(config: VerifyConfig, url: str) -> Verification:
    """Verify a cache behind a URL, shard by shard in a folder that is removed.

    Raises:
        ConfigError: a repair, or the teacher's word, needs a local copy.
    """
    if config.repair or config.level == "deep":
        asked = "--repair" if config.repair else "--level deep"
        raise ConfigError(
            f"{asked} needs a local folder: `mrmae cache-copy {url} FOLDER`, then `mrmae verify-cache FOLDER {asked}`"
            + (f", then `mrmae cache-copy FOLDER {url} --full`" if config.repair else "")
        )
    source, images = _images(config, functools.partial(read_remote_header, Objects(url)))
    local = default_local()
    with one_line(f"{local} can't be written"):
        local.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=local, prefix="verify-") as scratch, _progress() as advance:
            report = verify_remote(url, Path(scratch), config.level, source, advance, _threads(config))
    return Verification(report, None, images)


def _threads(config: VerifyConfig) -> int:
    """Shards that are checked at once; each has a second thread that hashes."""
    return config.threads or min(4, -(-len(os.sched_getaffinity(0)) // 2))


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    with Progress(1, "verify", "shard") as progress:

        def advance(_done: int, total: int) -> None:
            progress.expect(total)
            progress.advance()

        yield advance


def _check_dataset(config: VerifyConfig, report: Report) -> None:
    """Refuse to extract from images that the cache was not made of: the result would pass for the old one."""
    foreign = [finding.message for finding in report.findings if finding.kind == "dataset"]
    if foreign and report.damaged_shards():
        raise CacheError(
            f"{config.path}: shards {report.damaged_shards()} are damaged, and {foreign[0]}: say with --data where the "
            "cache's own images lie, or extract again into a new folder"
        )


def _revivable(path: Path, report: Report, source: ImageSource | None) -> list[int]:
    """Shards whose lost images have been repaired since; none when the images are not the cache's dataset."""
    if source is None or any(finding.kind in ("header", "dataset") for finding in report.findings):
        return []

    def can_be_read(index: int) -> bool:
        try:
            decode(source.read(index))
        except DataError:
            return False
        return True

    return revivable(path, report, can_be_read)


def _verify(config: VerifyConfig, path: Path, source: ImageSource | None) -> Report:
    deep = None
    if config.level == "deep":
        header = read_header(path)
        extractor = _extractor(config, path, header, source)

        def reextract(indices: Sequence[int], views: Sequence[int]) -> Iterable[Reextracted]:
            return extractor.reextract(indices, views, header)

        deep = functools.partial(compare, path, reextract, config.samples)

    with _progress() as advance:
        return verify(path, config.level, source, deep, advance, _threads(config))


def _images(config: VerifyConfig, header: Callable[[], CacheHeader]) -> tuple[ImageSource | None, str]:
    """The images that the cache was made of, if they are to be had, and a word on whether they were."""
    if config.level == "quick" and not config.repair and config.data is None:
        return None, "not asked for"
    try:
        dataset = header().dataset
    except CacheDamage:
        return None, "not checked"  # `verify` reports the damage itself
    try:
        return open_images(config.data or dataset.source, dataset.count), "checked"
    except (DataError, OSError):
        if config.data is not None or config.level == "deep":
            raise
        return None, f"not found at {dataset.source} (--data says where they lie now)"


def _extractor(config: VerifyConfig, path: Path, header: CacheHeader, source: ImageSource | None) -> Extractor:
    if source is None:
        raise CacheError(
            f"{config.path}: extracting anew needs the images, which are not at {header.dataset.source}: say with "
            "--data where they lie"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = teacher_of_cache(header.teacher, config.weights, device)
    views = ViewConfig.model_validate(header.view_policy.model_dump())
    _warn_of_versions(config, header, teacher, views)
    return Extractor(source, views, [teacher], _batch_size(path, header), config.workers, header.store)


def _warn_of_versions(config: VerifyConfig, header: CacheHeader, teacher: Teacher, views: ViewConfig) -> None:
    """Another decoder or torch gives the same views and tokens but for their last bits; the header names the old."""
    current = {**teacher.identity(), **preprocessing(views, header.store)}
    recorded = {**header.teacher, **header.preprocessing}
    changed = [key for key in recorded if key not in ("spec", "weights", "name") and current.get(key) != recorded[key]]
    if changed:
        differ = "; ".join(f"{key} was {recorded[key]} and is {current.get(key)}" for key in changed)
        log.warning(
            "%s was made by other versions (%s): what is computed anew may differ in its last bits", config.path, differ
        )


def _batch_size(path: Path, header: CacheHeader) -> int:
    """As extraction had it: sums in batches of another size may end in other bits."""
    for shard in range(header.shards):
        try:
            return int(read_commit(path, header, shard).times["batch_size"])
        except (CacheDamage, KeyError):
            continue  # damaged, missing, or older than the note
    return 64
