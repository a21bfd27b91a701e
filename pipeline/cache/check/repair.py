"""Mending what verification found: damaged shards are extracted again, and nothing else."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.cache.check.report import Report
from pipeline.cache.files import file_of, one_line
from pipeline.cache.format.commits import commit_path, committed_shards, read_commit
from pipeline.cache.format.header import CacheHeader, read_header
from pipeline.cache.format.records import ShardData
from pipeline.cache.stores import store_of
from pipeline.cache.writer import open_writer
from pipeline.errors import CacheDamage, CacheError
from pipeline.files import remove_if_dead

ExtractShard = Callable[[int], ShardData]
"""Makes the whole content of one shard again from the images, as extraction does."""


@dataclass(slots=True)
class Repair:
    """What was written again."""

    shards: list[int] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def revivable(path: Path, report: Report, can_be_read: Callable[[int], bool]) -> list[int]:
    """Shards, undamaged ones, with a tombstone whose image (by its index) can be read by now; ascending."""
    header, damaged = read_header(path), set(report.damaged_shards())
    return [
        shard
        for shard in committed_shards(path, header)
        if shard not in damaged
        and any(can_be_read(stone.index) for stone in read_commit(path, header, shard).tombstones)
    ]


def repair(path: Path, report: Report, extract_shard: ExtractShard, also: Iterable[int] = ()) -> Repair:
    """Write damaged and missing shards again and rebuild what is derived; then `verify` should find nothing.

    A shard's commit is withdrawn before its files are touched: a repair that is killed leaves it unwritten, not torn.

    Args:
        also: undamaged shards to write again, as `revivable` finds them.

    Raises:
        CacheDamage: cache.json itself is damaged. CacheError: an image that the shard was made of can't be read any
            more; the disk is full, ...
    """
    writer = open_writer(path)
    store = store_of(path, writer.header)
    done = Repair()
    for file in report.rebuilt_files():
        _make_way(path, [file])
        store.rebuild(file)
        done.files.append(file)
    for shard in sorted({*report.damaged_shards(), *also}):
        data = extract_shard(shard)
        _check_lost(path, writer.header, shard, data)
        writer.withdraw(shard)
        _make_way(path, [*store.files(shard), *store.derived(shard)])
        writer.clean_partial(shard)
        writer.write_shard(shard, data)
        done.shards.append(shard)
    return done


def remove_left_overs(path: Path, report: Report) -> None:
    """Remove the temporary files that `report` notes, unless their writer is at work, and note those that went."""
    for note in [note for note in report.notes if note.kind == "partial"]:
        assert note.file is not None
        remove_if_dead(file_of(path, note.file))
        if not file_of(path, note.file).exists():
            report.notes.remove(note)
            report.note("removed", f"{note.file}, which a killed writer left", file=note.file)


def _make_way(path: Path, files: Iterable[str]) -> None:
    """Remove what stands where files are written and is no file: pipes, devices, links to them, empty folders.

    Raises:
        CacheError: a folder that isn't empty.
    """
    for file in files:
        place = file_of(path, file)
        with one_line(f"{place} is no regular file and can't be removed"):
            if place.is_dir() and not place.is_symlink():
                place.rmdir()
            elif not place.is_file():
                place.unlink(missing_ok=True)


def _check_lost(path: Path, header: CacheHeader, shard: int, data: ShardData) -> None:
    """Refuse a repair that would lose a sample: its record may be a sound one beside a damaged one."""
    try:
        former = {stone.index for stone in read_commit(path, header, shard).tombstones}
    except CacheDamage:
        return  # what it held is unknown
    lost = sorted(data.tombstones.keys() - former)
    if lost:
        raise CacheError(
            f"shard {shard} stays as it is: {len(lost)} of its images can't be read any more (sample {lost[0]}: "
            f"{data.tombstones[lost[0]]}): restore them; or give them up, by removing {commit_path(path, shard)} and "
            "extracting again"
        )
