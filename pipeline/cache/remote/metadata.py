"""What says what a cache is, read from any place: its header, and one shard's commit record."""

from typing import Protocol

from pipeline.cache.format.commits import Commit, commit_file, parse_commit
from pipeline.cache.format.header import FILE, CacheHeader
from pipeline.cache.remote.objects import Objects
from pipeline.errors import CacheDamage, CacheError


class Place(Protocol):
    """A folder, or what is below a URL."""

    def read_whole(self, name: str) -> bytes:
        """A small file. Raises FileNotFoundError."""
        ...


def read_remote_header(objects: Objects) -> CacheHeader:
    """The header of a remote cache.

    Raises:
        CacheError: no cache there. CacheDamage: edited or damaged. StorageError: the server fails.
    """
    header = find_remote_header(objects)
    if header is None:
        raise CacheError(f"{objects.url}: no cache.json: give the folder that `mrmae cache-copy` wrote")
    return header


def find_remote_header(objects: Objects) -> CacheHeader | None:
    """The header of a remote cache; None where there is no cache. Other errors as `read_remote_header`."""
    try:
        content = objects.read_whole(FILE)
    except FileNotFoundError:
        return None
    return CacheHeader.from_bytes(content, f"{objects.url}/{FILE}")


def read_commit_at(place: Place, header: CacheHeader, shard: int) -> tuple[bytes, Commit] | None:
    """A shard's commit record, as it is written and what it says; None where the shard isn't committed.

    Raises:
        CacheDamage: it is damaged, or of another shard or cache. StorageError: the server fails.
    """
    try:
        content = place.read_whole(commit_file(shard))
        return content, parse_commit(content, header, shard)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CacheDamage(f"{commit_file(shard)}: {error}") from error
