"""`mrmae cache-info PATH`: what a cache holds, from which teacher, how faithful, how complete."""

from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.cache import CacheHeader, Commit, FidelityFigures, read_commit, read_header
from pipeline.cache.budget import readable
from pipeline.cache.format.commits import committed_shards
from pipeline.config import Config, PathField

SLOWER = "which makes a read about six times slower than a plain one"


class CacheInfoConfig(Config):
    """Which cache, and how much of it to list."""

    path: PathField  # the cache's folder
    tombstones: int = Field(default=20, ge=0)  # at most so many are listed


def run(config: CacheInfoConfig) -> dict[str, Any]:
    """Read the header and every commit record, no data. JSON-able.

    Raises:
        CacheError: no cache there. CacheDamage: its header or a commit record is damaged.
    """
    path: Path = config.path
    header = read_header(path)
    commits = [read_commit(path, header, shard) for shard in committed_shards(path, header)]
    stones = [stone for commit in commits for stone in commit.tombstones]
    size = sum(entry.bytes for commit in commits for entry in commit.files.values())
    live = sum(commit.count for commit in commits) - len(stones)
    fidelity = FidelityFigures.merge(commit.fidelity for commit in commits)
    return {
        "path": str(path),
        "store": header.store,
        "dataset": header.dataset.model_dump(),
        "teacher": header.teacher,
        "preprocessing": header.preprocessing,
        "views": header.view_policy.model_dump(),
        "tokens": header.tokens,
        "grid": list(header.grid),
        "dim": header.dim,
        "quantiser": header.quantiser.name,
        "attention": header.attention,
        "compression": header.compression,
        "reads": _reads(header, commits),
        "samples_per_shard": header.samples_per_shard,
        "shards": header.shards,
        "committed": len(commits),
        "complete": len(commits) == header.shards,
        "missing_shards": sorted(set(range(header.shards)) - {commit.shard for commit in commits}),
        "bytes": size,
        "size": readable(size),
        "bytes_per_view": round(size / (live * header.views)) if live else 0,
        "fidelity": None if fidelity is None else fidelity.model_dump(),
        "tombstones": len(stones),
        "tombstone_list": [stone.model_dump() for stone in stones[: config.tombstones]],
        "seconds": _seconds(commits),
        "fingerprint": header.fingerprint,
    }


def _reads(header: CacheHeader, commits: list[Commit]) -> str:
    """What a training step pays for a record, and what compression changed about it."""
    plain = header.tokens * header.dim * header.quantiser.dtype.itemsize
    if header.compression is None:
        return f"uncompressed: one pread and one checksum a record, {plain} bytes of tokens"
    # Tombstones and the padding of the last shard take next to nothing, so live records share all bytes.
    live = sum(commit.count - len(commit.tombstones) for commit in commits) * header.views
    packed = sum(e.bytes for commit in commits for file, e in commit.files.items() if file.startswith("tokens/"))
    size = f"{round(packed / live)} bytes of tokens a view instead of {plain}" if live else "nothing written yet"
    return f"compressed: {size}, and every read decompresses its whole record, {SLOWER}"


def _seconds(commits: list[Commit]) -> float | None:
    """Time that extraction took over all shards, where it noted `seconds`."""
    seconds = [float(c.times["seconds"]) for c in commits if isinstance(c.times.get("seconds"), int | float)]
    return sum(seconds) if seconds else None
