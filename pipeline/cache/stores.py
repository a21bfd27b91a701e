"""The stores by the name that a header gives them."""

from pathlib import Path

from pipeline.cache.format.header import CacheHeader
from pipeline.cache.format.records import ShardFiles, Store
from pipeline.cache.tar.store import WebdatasetStore
from pipeline.cache.zarr.store import ZarrStore


def store_of(path: Path, header: CacheHeader, files: ShardFiles | None = None) -> Store:
    """The store of the cache at `path`; `files` is for one whose files come and go."""
    return ZarrStore(path, header, files) if header.store == "zarr" else WebdatasetStore(path, header, files)
