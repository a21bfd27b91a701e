"""What a cache may be: its store, its precision, the attention that it holds; and where one is read from."""

import os
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from pipeline.config import Amount, Config, LocationField, PathField

StoreName = Literal["zarr", "webdataset"]
AttentionKind = Literal["mean", "heads", "none"]
SummaryKind = Literal["class"]
QuantiserName = Literal["int8", "int4", "codes", "float16", "float32"]


def default_local() -> Path:
    """Where what is on its way from or to a URL lies, if nothing else is asked for."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mrmae"


class CacheInput(Config):
    """A cache to read: a local folder, or a URL whose shards are fetched into one."""

    main_key: ClassVar[str] = "path"

    path: LocationField  # the cache's folder, or its URL: s3://, gs://, hf://datasets/, https://
    # Where shards of remote caches are kept: a folder on a local disk, which processes and runs share; ~/.cache/mrmae
    local: PathField | None = None
    local_limit: Amount = Field(50_000_000_000, gt=0)  # its bytes, or 50GB
    read: Literal["shards", "range"] = "shards"  # of a URL: whole shards, or each record by a request of its own
