"""Show what a cache holds.

That is: teacher, views, bytes a view, fidelity, completeness, images that could not be read.

Reads the header and the commit records at PATH, no data. Writes nothing; of a remote cache (s3://, gs://,
hf://datasets/, https://) it keeps these in the local folder that training uses. Costs seconds.
"""

from typing import Any

from pydantic import Field

from pipeline.assembly.caches import place_of
from pipeline.cache import Commit, FidelityFigures, RemoteCache, open_mirror, read_commit, read_header
from pipeline.cache.budget import readable
from pipeline.cache.format.commits import committed_shards
from pipeline.config import Config, LocationField
from pipeline.configs.cache import CacheInput


class CacheInfoConfig(Config):
    """Which cache, and how much of it to list."""

    path: LocationField  # the cache's folder, or its URL
    tombstones: int = Field(default=20, ge=0)  # at most so many are listed


def run(config: CacheInfoConfig) -> dict[str, Any]:
    """Read the header and every commit record, no data. JSON-able.

    Raises:
        CacheError: no cache there. CacheDamage: its header or a commit record is damaged.
    """
    place = place_of(CacheInput(path=config.path))
    path = open_mirror(place).root if isinstance(place, RemoteCache) else place
    header = read_header(path)
    commits = [read_commit(path, header, shard) for shard in committed_shards(path, header)]
    stones = [stone for commit in commits for stone in commit.tombstones]
    size = sum(entry.bytes for commit in commits for entry in commit.files.values())
    live = sum(commit.count for commit in commits) - len(stones)
    token_bytes = header.rows * header.stored_dim * header.quantiser.dtype.itemsize
    fidelity = FidelityFigures.merge(commit.fidelity for commit in commits)
    return {
        "path": str(config.path),
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
        "summary": header.summary,
        "reads": f"one pread and one checksum a record, {token_bytes} bytes of tokens",
        "samples_per_shard": header.samples_per_shard,
        "shards": header.shards,
        "committed": len(commits),
        "complete": len(commits) == header.shards,
        "missing_shards": sorted(set(range(header.shards)) - {commit.shard for commit in commits}),
        "bytes": size,
        "size": readable(size),
        "bytes_per_view": round(size / (live * header.views)) if live else 0,
        "fidelity": None if fidelity is None else fidelity.model_dump(exclude_none=True),
        "tombstones": len(stones),
        "tombstone_list": [stone.model_dump() for stone in stones[: config.tombstones]],
        "seconds": _seconds(commits),
        "fingerprint": header.fingerprint,
    }


def _seconds(commits: list[Commit]) -> float | None:
    """Time that extraction took over all shards, where it noted `seconds`."""
    seconds = [float(c.times["seconds"]) for c in commits if isinstance(c.times.get("seconds"), int | float)]
    return sum(seconds) if seconds else None
