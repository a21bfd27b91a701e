"""The teacher cache: written once, read hundreds of times; exact, small, fast, and never wrong in silence.

    create_cache(path, header)
    open_writer(path).write_shard(0, data)
    record = open_cache(path).read(index, view)

`docs/cache-format.md` describes the bytes.
"""

from pipeline.cache.base import Record, ShardData, hash_source
from pipeline.cache.commits import Commit, Tombstone, read_commit
from pipeline.cache.deep import Reextract, Reextracted
from pipeline.cache.fidelity import Fidelity, FidelityFigures
from pipeline.cache.manifest import BLOSC, CacheHeader, DatasetSection, ViewSection, match_header, read_header
from pipeline.cache.quantiser import Quantiser
from pipeline.cache.reader import CacheReader, open_cache
from pipeline.cache.repair import Repair, repair, revivable
from pipeline.cache.report import Finding, Report
from pipeline.cache.verify import Source, verify
from pipeline.cache.writer import CacheWriter, create_cache, open_writer, wait_for_cache
from pipeline.cache.writing import ShardArrays, ShardBuffers, ShardWriting

__all__ = [
    "BLOSC",
    "CacheHeader",
    "CacheReader",
    "CacheWriter",
    "Commit",
    "DatasetSection",
    "Fidelity",
    "FidelityFigures",
    "Finding",
    "Quantiser",
    "Record",
    "Reextract",
    "Reextracted",
    "Repair",
    "Report",
    "ShardArrays",
    "ShardBuffers",
    "ShardData",
    "ShardWriting",
    "Source",
    "Tombstone",
    "ViewSection",
    "create_cache",
    "hash_source",
    "match_header",
    "open_cache",
    "open_writer",
    "read_commit",
    "read_header",
    "repair",
    "revivable",
    "verify",
    "wait_for_cache",
]
