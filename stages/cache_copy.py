"""Copy a cache between a local folder and a remote place.

One side may be a URL; s3:// and gs:// are also written. What is committed at SRC is copied, shard by shard:

    mrmae cache-copy /data/clip s3://bucket/clip
    mrmae cache-copy s3://bucket/clip /scratch/clip --shards 0:100

Reads SRC and compares every file with its commit record. Writes DST: a shard's files, then its commit record, and,
once all shards are there, README.md, a card that the Hugging Face hub reads; one that is there stays. What went to a
remote place is read back and compared. Costs one reading of SRC, and one of DST where that is remote.

Run it again after a stop: files that DST has in their length are kept; with --full they are read, and replaced where
they are damaged. Damaged shards of SRC are left out and named. To the hub: copy to a local folder, then
hf upload-large-folder OWNER/NAME FOLDER --repo-type dataset.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.cache import CacheHeader, Commit, read_header, shard_span
from pipeline.cache.budget import readable, require_room
from pipeline.cache.card import card
from pipeline.cache.remote.copying import Copying, Folder, require_writable
from pipeline.cache.remote.metadata import read_remote_header
from pipeline.cache.remote.objects import Objects
from pipeline.cards import FILE as CARD
from pipeline.config import Config, LocationField
from pipeline.errors import CacheDamage, CacheError, ConfigError
from pipeline.progress import Progress

_SHARDS = 4  # copied at once


class CacheCopyConfig(Config):
    """The options of `cache-copy`."""

    source: LocationField
    target: LocationField
    shards: str | None = None  # A:B
    dry_run: bool = False
    full: bool = False  # read what the target has already
    license: str | None = Field(None, pattern=r"^[a-z0-9.-]+$")  # None: unknown


def run(config: CacheCopyConfig) -> dict[str, Any]:
    """Copy; returns what was done.

    Raises:
        CacheError: no cache at the source, another one at the target, or shards of the source are damaged.
        ConfigError: the target can't be written to, or both sides are remote. StorageError: a server fails.
    """
    source, target = _place(config.source), _place(config.target)
    _check_target(source, target)
    header = read_header(source.root) if isinstance(source, Folder) else read_remote_header(source)
    shards = shard_span(header, config.shards, "--shards")
    preview = Copying(source, target, header, config.full and config.dry_run)
    needed, commits = _copy(preview, shards, dry=True)
    facts = {"source": str(source), "target": str(target), "shards": f"{len(commits)} of {header.shards}"}
    if config.dry_run:
        return facts | {"to_copy": needed, "size": readable(needed)}
    if isinstance(target, Folder):
        require_room(target.root, needed)
    copying = Copying(source, target, header, config.full)
    copying.open_target()
    copied, commits = _copy(copying, shards, dry=False, total=needed)
    if len(commits) == header.shards:
        _write_card(target, header, commits, config.license or "unknown")
    return facts | {"copied": copied, "size": readable(copied)}


def _place(location: Path | str) -> Folder | Objects:
    return Folder(location) if isinstance(location, Path) else Objects(location)


def _check_target(source: Folder | Objects, target: Folder | Objects) -> None:
    require_writable(target)
    if isinstance(source, Objects) and isinstance(target, Objects):
        raise ConfigError("SRC and DST are both remote: copy to a local folder first, and from there")


def _copy(copying: Copying, shards: range, dry: bool, total: int = 0) -> tuple[int, list[Commit]]:
    """Copy shards, several at once; returns bytes and the commit records.

    Raises:
        CacheError: shards of the source are damaged; all others are copied.
    """
    copied, commits, damaged = 0, list[Commit](), list[str]()
    with ThreadPoolExecutor(_SHARDS, "copy") as pool, Progress(total, "copy", "B", show=not dry) as progress:
        running = {shard: pool.submit(copying.copy, shard, dry) for shard in shards}
        try:
            for shard, future in running.items():
                try:
                    outcome = future.result()
                except CacheDamage as error:
                    damaged.append(f"shard {shard}: {error}")
                    continue
                if outcome is not None:
                    copied += outcome[0]
                    commits.append(outcome[1])
                    progress.advance(outcome[0])
        finally:
            pool.shutdown(cancel_futures=True)
    if damaged and not dry:
        raise CacheError(
            f"{len(damaged)} shards are not copied, the first is {damaged[0]}: mend SRC by `mrmae verify-cache SRC "
            "--repair`, then run the same command again"
        )
    return copied, commits


def _write_card(target: Folder | Objects, header: CacheHeader, commits: list[Commit], licence: str) -> None:
    if target.size(CARD) is None:
        target.write(CARD, card(header, commits, licence).encode())
