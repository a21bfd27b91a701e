"""Targets as one Zarr v3 group: `zarr.open(path)["tokens"][i, v]` works for anyone; we read the chunk files raw.

Every array has one chunk for each (shard, view), uncompressed and followed by its crc32c. Such a file is the plain
array, so one `pread` fetches a record: thousands of times faster than decoding a chunk for each sample. Compressed
tokens use zarr's sharding instead, one inner chunk a record, at the price of a decompression for each read.
"""

import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store as ZarrStoreBase
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from pipeline.cache.files import Descriptor, FileEntry, file_of, one_line, read_table, sync_folder, write_file
from pipeline.cache.format.header import CacheHeader
from pipeline.cache.format.records import Scan, Seal, ShardData, Walk
from pipeline.cache.zarr.chunks import blosc, packed_chunk, raw_chunk, text_chunk
from pipeline.cache.zarr.scan import scan_chunks
from pipeline.cache.zarr.view import (
    ENTRY,
    PACKED_ENTRY,
    Layout,
    Rooms,
    ZarrView,
    array_specs,
    chunk_file,
    entry_table,
    key_table,
    packed_index,
    parse_strings,
    table_sizes,
)
from pipeline.errors import CacheError

_KEY_ENCODING: Any = {"name": "default", "separator": "."}  # one flat folder an array: one fsync a shard, not five
_SHUFFLES: tuple[Any, ...] = ("noshuffle", "shuffle", "bitshuffle")


def _create_group(store: ZarrStoreBase, header: CacheHeader) -> None:
    group = zarr.create_group(store)
    for name, (shape, dtype, dimension_names) in array_specs(header).items():
        chunk = (header.samples_per_shard, *((1,) if len(shape) > 1 else ()), *shape[2:])
        layout: dict[str, Any] = {"chunks": chunk, "compressors": [Crc32cCodec()]}
        if name == "tokens" and header.compression is not None:
            layout = {"chunks": (1, 1, *shape[2:]), "shards": chunk, "compressors": [_codec(header.compression)]}
        if dtype != "str":
            layout |= {"serializer": BytesCodec(endian=None if np.dtype(dtype).itemsize == 1 else "little")}
        group.create_array(
            name,
            shape=shape,
            dtype=dtype,
            fill_value="" if dtype == "str" else 0,
            filters=None if dtype != "str" else "auto",
            chunk_key_encoding=_KEY_ENCODING,
            dimension_names=dimension_names,
            **layout,
        )


@lru_cache(4)
def _metadata(header: bytes) -> dict[str, bytes]:
    """Every zarr.json of a cache, as zarr itself writes it."""
    memory: dict[str, Buffer] = {}
    _create_group(MemoryStore(memory), CacheHeader.from_bytes(header))
    return {key: value.to_bytes() for key, value in memory.items()}


def _codec(compression: dict[str, Any]) -> BloscCodec:
    """zarr's codec for a numcodecs config, with every default made explicit."""
    codec = blosc(compression)
    return BloscCodec(
        cname=codec.cname, clevel=codec.clevel, shuffle=_SHUFFLES[codec.shuffle], blocksize=codec.blocksize
    )


class ZarrStore:
    """See `pipeline.cache.format.records.Store`."""

    stores_images = False

    def __init__(self, root: Path, header: CacheHeader) -> None:
        self._root, self._header = root, header
        self._specs, self._rooms = array_specs(header), Rooms(Layout(header))
        self._large = [(name, len(self._specs[name][0])) for name in self._rooms.layout.names]
        self._entry = ENTRY if header.compression is None else PACKED_ENTRY
        self.descriptors = len(self._large)

    def create(self) -> None:
        for file, content in self._metadata.items():
            path = file_of(self._root, file)
            try:
                write_file(path, [content], exclusive=True)
            except FileExistsError as error:
                if path.read_bytes() != content:
                    raise CacheError(
                        f"{path} belongs to another cache; choose another folder, or remove that one"
                    ) from error
            sync_folder(path.parent)

    @property
    def _metadata(self) -> dict[str, bytes]:
        return _metadata(self._header.to_bytes())

    def files(self, shard: int) -> list[str]:
        return [
            chunk_file(name, shard, view, len(shape))
            for name, (shape, _, _) in self._specs.items()
            for view in range(self._header.views if len(shape) > 1 else 1)
        ]

    def write(self, shard: int, data: ShardData, seal: Seal) -> dict[str, FileEntry]:
        written: dict[str, FileEntry] = {}
        sums = np.zeros(data.hflip.shape, np.uint32)  # crc32c of every record; 0 at tombstones
        for view in range(self._header.views):
            rows = _sealed(self._header.shard_range(shard), data, view, seal, sums)
            self._write("tokens", shard, view, rows, written)
        arrays: dict[str, Any] = {"scale": data.scale, "attention": data.attention, "box": data.box}
        for name, array in (arrays | {"hflip": data.hflip, "crc32c": sums}).items():
            for view in range(self._header.views if name in self._specs else 0):
                self._write(name, shard, view, [np.ascontiguousarray(array[:, view])], written)
        self._write("source_hash", shard, 0, [data.source_hash], written)
        text = text_chunk(data.keys, self._header.samples_per_shard)
        written[chunk_file("key", shard, 0, 1)] = write_file(self._path("key", shard, 0), text)
        for name in self._specs:
            sync_folder(self._root / name)
        return written

    def _write(self, name: str, shard: int, view: int, rows: Iterable[Any], written: dict[str, FileEntry]) -> None:
        """One chunk file; `rows` are contiguous arrays that make it up."""
        shape, dtype, _ = self._specs[name]
        S, path = self._header.samples_per_shard, self._path(name, shard, view)
        if name == "tokens" and self._header.compression is not None:
            parts: Iterable[Any] = packed_chunk(rows, S, blosc(self._header.compression))
        else:
            missing = S - len(self._header.shard_range(shard))
            parts = raw_chunk(rows, missing * int(np.prod(shape[2:], dtype=int)) * np.dtype(dtype).itemsize)
        written[chunk_file(name, shard, view, len(shape))] = write_file(path, parts)

    def _path(self, name: str, shard: int, view: int) -> Path:
        return file_of(self._root, chunk_file(name, shard, view, len(self._specs[name][0])))

    def table(self, shard: int, view: int | None) -> bytes:
        S = self._header.samples_per_shard
        if view is None:
            path = self._path("key", shard, 0)
            return key_table(parse_strings(read_table(path), S, path.name))
        tables = {name: read_table(self._path(name, shard, view), size) for name, size in table_sizes(S).items()}
        packed = self._entry is PACKED_ENTRY
        index = packed_index(Descriptor(self._path("tokens", shard, view)), S) if packed else None
        return entry_table(tables, index)

    def open_view(self, shard: int, view: int, shared: Any, table: Any) -> ZarrView:
        names = [chunk_file(name, shard, view, dimensions) for name, dimensions in self._large]
        files = [Descriptor(f"{self._root}/{name}") for name in names]
        return ZarrView(files, self._entry, shared, table, self._rooms)

    def scan(self, shard: int, view: int, rows: list[int], walk: Walk, fresh: bool = False) -> Scan:
        return scan_chunks(self._root, self._header, shard, view, rows, walk)

    def uncovered(self, shard: int | None, thorough: bool) -> dict[str, str]:
        problems = {}
        for file, expected in self._metadata.items() if shard is None else ():
            path = file_of(self._root, file)
            if not path.is_file():
                problems[file] = "is missing"
            elif not _same_json(path.read_bytes(), expected):
                problems[file] = "is not what this cache's header asks for"
        return problems

    def derived(self, shard: int | None) -> list[str]:
        return list(self._metadata) if shard is None else []

    def rebuild(self, file: str) -> None:
        path = file_of(self._root, file)
        with one_line(f"{path}: can't be written"):
            write_file(path, [self._metadata[file]])
            sync_folder(path.parent)


def _same_json(found: bytes, expected: bytes) -> bool:
    """Equal bytes, or equal content: another version of zarr may lay out the file otherwise."""
    try:
        return found == expected or bool(json.loads(found) == json.loads(expected))
    except (ValueError, RecursionError):
        return False


def _sealed(span: range, data: ShardData, view: int, seal: Seal, sums: NDArray[np.uint32]) -> Iterator[NDArray[Any]]:
    """The tokens of each row of one view, whose checksum goes into `sums` [n, V] while the CPU's cache holds them."""
    for row, index in enumerate(span):
        record = data.record(row, view)
        if index not in data.tombstones:
            sums[row, view] = seal(index, view, record)
        yield record.tokens
