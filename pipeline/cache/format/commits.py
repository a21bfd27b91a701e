"""commits/000017.json: the last file of a finished shard, and the only one that says that it is finished.

One line of canonical JSON: the shard's number, its sample count, each file's length and xxh3-128, the tombstones, and
the sha256 of all of that. Readers and resume trust nothing else: a missing zarr chunk would read as zeros, a tar that
was cut between members as a shorter one.
"""

import hashlib
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.cache.files import FileEntry, read_whole, write_file
from pipeline.cache.format.header import CacheHeader, canonical
from pipeline.errors import CacheDamage
from pipeline.files import sync

FOLDER = "commits"
_INSIDE = re.compile(r"(\w[\w.-]*/)*\w[\w.-]*", re.ASCII)  # a file in the cache's folder; no part starts with a dot


class Tombstone(BaseModel):
    """A sample that could not be read when the cache was made; training passes over it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    index: int
    key: str
    error: str


class Commit(BaseModel):
    """The content of one commit record."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    shard: int
    fingerprint: str
    count: int  # samples of the shard, tombstones among them
    files: dict[str, FileEntry]
    tombstones: list[Tombstone]
    fidelity: dict[str, Any]
    times: dict[str, Any]

    def to_bytes(self) -> bytes:
        fields = self.model_dump()
        digest = hashlib.sha256(canonical(fields)).hexdigest()
        return canonical({**fields, "digest": digest}) + b"\n"

    @classmethod
    def from_bytes(cls, content: bytes) -> "Commit":
        """Parse a record. Raises ValueError when a single byte of it isn't as it was written."""
        try:
            fields = json.loads(content)
            fields.pop("digest")
            commit = cls.model_validate(fields)
        except (ValidationError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError("not a commit record") from error
        if commit.to_bytes() != content:
            raise ValueError("its digest differs")
        return commit


def commit_file(shard: int) -> str:
    """The path of a commit record, relative to the cache's folder."""
    return f"{FOLDER}/{shard:06d}.json"


def commit_path(root: Path, shard: int) -> Path:
    return root / commit_file(shard)


def write_commit(root: Path, commit: Commit) -> None:
    """Declare a shard finished. Its files must be durable by now."""
    path = commit_path(root, commit.shard)
    write_file(path, [commit.to_bytes()])
    sync(path.parent)


def read_commit(root: Path, header: CacheHeader, shard: int) -> Commit:
    """One shard's commit record, checked against the header.

    Raises:
        CacheDamage: missing, damaged, of another shard or cache.
    """
    path = commit_path(root, shard)
    try:
        return parse_commit(read_whole(path), header, shard)
    except (ValueError, CacheDamage) as error:
        raise CacheDamage(
            f"shard {shard}: commit record {path.name}: {error}; run `mrmae verify-cache {root} --repair`"
        ) from error


def parse_commit(content: bytes, header: CacheHeader, shard: int) -> Commit:
    """One shard's commit record. Raises ValueError when it is damaged, or of another shard or cache."""
    commit, span = Commit.from_bytes(content), header.shard_range(shard)
    if commit.fingerprint != header.fingerprint:
        raise ValueError("it belongs to another cache")
    if commit.shard != shard or commit.count != len(span):
        raise ValueError(f"it states shard {commit.shard} with {commit.count} samples")
    if any(stone.index not in span for stone in commit.tombstones):
        raise ValueError("a tombstone lies outside its shard")
    if not all(map(_INSIDE.fullmatch, commit.files)):
        raise ValueError("it names a file outside the cache")
    return commit


def committed_shards(root: Path, header: CacheHeader) -> list[int]:
    """The shards that have a commit record, ascending; the records are not read. Other files are left to `verify`."""
    folder = root / FOLDER
    return shards_named([path.name for path in folder.iterdir()] if folder.is_dir() else [], header)


def shards_named(names: Collection[str], header: CacheHeader) -> list[int]:
    """The shards whose commit records have these names, ascending."""
    shards = sorted(int(name[:-5]) for name in names if re.fullmatch(r"[0-9]{6,9}\.json", name))
    return [shard for shard in shards if shard < header.shards and f"{shard:06d}.json" in names]
