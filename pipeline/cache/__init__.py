"""The teacher cache: written once, read hundreds of times; exact, small, fast, and never wrong in silence.

    create_cache(path, header)
    open_writer(path).write_shard(0, data)
    record = open_cache(path).read(index, view)

format/        what every cache consists of: header, commit records, records, quantisers; what a store must offer
zarr/, tar/    the two stores: how records lie on the disk
check/         verification and repair
remote/        caches behind a URL: shards are fetched into a bounded local folder
reader.py, writer.py, output.py, shard_writing.py, budget.py    what training and extraction use

Imports go one way: files.py ← format ← zarr, tar ← stores.py ← remote ← reader, writer ← output, check.
`docs/cache-format.md` describes the bytes.
"""

from pipeline.cache.check.deep import Reextracted, compare
from pipeline.cache.check.remote import verify_remote
from pipeline.cache.check.repair import Repair, remove_left_overs, repair, revivable
from pipeline.cache.check.report import Finding, Report
from pipeline.cache.check.verify import Source, verify
from pipeline.cache.format.commits import Commit, Tombstone, read_commit
from pipeline.cache.format.fidelity import Fidelity, FidelityFigures
from pipeline.cache.format.header import (
    CacheHeader,
    DatasetSection,
    ViewSection,
    match_header,
    read_header,
    shard_span,
)
from pipeline.cache.format.quantiser import Quantiser
from pipeline.cache.format.records import Record, ShardData
from pipeline.cache.output import Output, output_at
from pipeline.cache.reader import CacheReader, open_cache
from pipeline.cache.remote.ahead import FetchAhead
from pipeline.cache.remote.folder import LocalFolder
from pipeline.cache.remote.mirror import Mirror, RemoteCache, open_mirror
from pipeline.cache.shard_writing import ShardArrays, ShardBuffers, ShardWriting
from pipeline.cache.writer import CacheWriter, create_cache, open_writer
from pipeline.configs.cache import AttentionKind, QuantiserName, StoreName

__all__ = [
    "AttentionKind",
    "CacheHeader",
    "CacheReader",
    "CacheWriter",
    "Commit",
    "DatasetSection",
    "FetchAhead",
    "Fidelity",
    "FidelityFigures",
    "Finding",
    "LocalFolder",
    "Mirror",
    "Output",
    "Quantiser",
    "QuantiserName",
    "Record",
    "Reextracted",
    "RemoteCache",
    "Repair",
    "Report",
    "ShardArrays",
    "ShardBuffers",
    "ShardData",
    "ShardWriting",
    "Source",
    "StoreName",
    "Tombstone",
    "ViewSection",
    "compare",
    "create_cache",
    "match_header",
    "open_cache",
    "open_mirror",
    "open_writer",
    "output_at",
    "read_commit",
    "read_header",
    "remove_left_overs",
    "repair",
    "revivable",
    "shard_span",
    "verify",
    "verify_remote",
]
