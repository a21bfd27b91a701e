"""Targets as one Zarr v3 group: `zarr.open(path)["tokens"][i, v]` works for anyone; this code reads chunk files raw.

Every array has one chunk for each (shard, view), uncompressed and followed by its crc32c. Such a file is the plain
array, so one `pread` fetches a record: thousands of times faster than decoding a chunk for each sample.
"""

import json
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from pipeline.cache.files import FileEntry, file_of, one_line, read_table, read_whole, write_file
from pipeline.cache.format.header import CacheHeader
from pipeline.cache.format.records import LocalFiles, Seal, ShardData, ShardFiles
from pipeline.cache.zarr.chunks import parse_texts, raw_chunk, text_chunk
from pipeline.cache.zarr.view import (
    Layout,
    ThreadBuffer,
    ZarrView,
    array_specs,
    chunk_file,
    entry_table,
    key_table,
    table_sizes,
)
from pipeline.errors import CacheDamage, CacheError
from pipeline.files import remove_dead_partials, sync

_LONGEST_KEY = 4096  # bytes, as a path: what a shard's keys have on average at most
_ADDED = ("attributes", "consolidated_metadata")  # entries of a zarr.json that anyone may add; nothing here reads them
_KEY_ENCODING: Any = {"name": "default", "separator": "."}  # one flat folder an array: one fsync a shard, not five


@lru_cache(4)
def _metadata(header: bytes) -> dict[str, bytes]:
    """Every zarr.json of a cache, as zarr itself writes it."""
    memory: dict[str, Buffer] = {}
    cache_header = CacheHeader.from_bytes(header)
    group = zarr.create_group(MemoryStore(memory))
    for name, (shape, dtype, dimension_names) in array_specs(cache_header).items():
        text = dtype == "str"
        endian: Any = None if text or np.dtype(dtype).itemsize == 1 else "little"
        group.create_array(
            name,
            shape=shape,
            dtype=dtype,
            chunks=(cache_header.samples_per_shard, *((1,) if len(shape) > 1 else ()), *shape[2:]),
            compressors=[Crc32cCodec()],
            serializer="auto" if text else BytesCodec(endian=endian),
            fill_value="" if text else 0,
            filters="auto" if text else None,
            chunk_key_encoding=_KEY_ENCODING,
            dimension_names=dimension_names,
        )
    return {key: value.to_bytes() for key, value in memory.items()}


class ZarrStore:
    """See `pipeline.cache.format.records.Store`."""

    stores_images = False

    def __init__(self, root: Path, header: CacheHeader, files: ShardFiles | None = None) -> None:
        self._root, self._header, self._shard_files = root, header, files or LocalFiles(root)
        self._specs, self._buffer = array_specs(header), ThreadBuffer(Layout(header))
        self._large = [(name, len(self._specs[name][0])) for name in self._buffer.layout.names]
        self.descriptors = len(self._large)
        self.entries = frozenset({"zarr.json", *self._specs})

    def create(self) -> None:
        for file, content in self._metadata.items():
            path = file_of(self._root, file)
            remove_dead_partials(path)
            try:
                write_file(path, [content], exclusive=True)
            except FileExistsError as error:
                if path.read_bytes() != content:
                    raise CacheError(
                        f"{path} belongs to another cache; choose another folder, or remove that one"
                    ) from error
            sync(path.parent)

    @property
    def _metadata(self) -> dict[str, bytes]:
        return _metadata(self._header.to_bytes())

    def files(self, shard: int) -> list[str]:
        return self._files(shard, self._specs)

    def tables(self, shard: int) -> list[str]:
        return self._files(shard, self._specs.keys() - dict(self._large).keys())

    def record_files(self, shard: int) -> list[str]:
        return self._files(shard, ["tokens"])

    def _files(self, shard: int, names: Collection[str]) -> list[str]:
        return [
            chunk_file(name, shard, view, len(shape))
            for name, (shape, _, _) in self._specs.items()
            if name in names
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
            sync(self._root / name)
        return written

    def _write(self, name: str, shard: int, view: int, rows: Iterable[Any], written: dict[str, FileEntry]) -> None:
        """One chunk file; `rows` are contiguous arrays that make it up."""
        shape, dtype, _ = self._specs[name]
        missing = self._header.samples_per_shard - len(self._header.shard_range(shard))
        parts = raw_chunk(rows, missing * int(np.prod(shape[2:], dtype=int)) * np.dtype(dtype).itemsize)
        written[chunk_file(name, shard, view, len(shape))] = write_file(self._path(name, shard, view), parts)

    def _path(self, name: str, shard: int, view: int) -> Path:
        return file_of(self._root, chunk_file(name, shard, view, len(self._specs[name][0])))

    def table(self, shard: int, view: int | None, fresh: bool = False) -> bytes:
        S = self._header.samples_per_shard
        if view is None:
            path = self._path("key", shard, 0)
            return key_table(parse_texts(read_table(path, limit=8 + S * _LONGEST_KEY), S, path.name))
        return entry_table(
            {name: read_table(self._path(name, shard, view), size) for name, size in table_sizes(S).items()}
        )

    def open_view(self, shard: int, view: int, shared: Any, table: Any) -> ZarrView:
        names = [chunk_file(name, shard, view, dimensions) for name, dimensions in self._large]
        files = [self._shard_files.open_file(shard, name) for name in names]
        return ZarrView(files, shared, table, self._buffer)

    def uncovered(self, shard: int | None, thorough: bool) -> dict[str, str]:
        problems = {}
        for file, expected in self._metadata.items() if shard is None else ():
            try:
                content = read_whole(file_of(self._root, file))
            except CacheDamage as error:
                problems[file] = str(error).removeprefix("zarr.json ")
                continue
            if not _describes_the_same(content, expected):
                problems[file] = "is not what this cache's header asks for"
        return problems

    def derived(self, shard: int | None) -> list[str]:
        return list(self._metadata) if shard is None else []

    def rebuild(self, file: str) -> None:
        path = file_of(self._root, file)
        with one_line(f"{path}: can't be written"):
            remove_dead_partials(path)
            write_file(path, [self._metadata[file]])
            sync(path.parent)


def _describes_the_same(found: bytes, expected: bytes) -> bool:
    """Equal but for the layout of the text, attributes and consolidated metadata, which zarr's own tools add.

    Blanks around the text are a difference: no version of zarr writes them.
    """
    try:
        return found == expected or (found == found.strip() and _content(found) == _content(expected))
    except (ValueError, RecursionError):
        return False


def _content(metadata: bytes) -> Any:
    content = json.loads(metadata)
    if isinstance(content, dict):
        content = {name: value for name, value in content.items() if name not in _ADDED}
    return content


def _sealed(span: range, data: ShardData, view: int, seal: Seal, sums: NDArray[np.uint32]) -> Iterator[NDArray[Any]]:
    """The tokens of each row of one view. Each record's checksum goes into `sums` [n, V] on the way."""
    for row, index in enumerate(span):
        record = data.record(row, view)
        if index not in data.tombstones:
            sums[row, view] = seal(index, view, record)
        yield record.tokens
