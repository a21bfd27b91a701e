"""Targets as one Zarr v3 group: `zarr.open(path)["tokens"][i, v]` works for anyone; we read the chunk files raw.

Every array has one chunk for each (shard, view), uncompressed and followed by its crc32c. Such a file is the plain
array, so one `pread` fetches a record: thousands of times faster than decoding a chunk for each sample. Compressed
tokens use zarr's sharding instead, one inner chunk a record, at the price of a decompression for each read.
"""

import asyncio
import json
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numcodecs
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store as ZarrStoreBase
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore, MemoryStore

from pipeline.cache.base import Scan, Seal, ShardData
from pipeline.cache.files import (
    FileEntry,
    file_of,
    one_line,
    sync_folder,
    write_file,
)
from pipeline.cache.manifest import CacheHeader
from pipeline.cache.zarr_scan import scan_chunks
from pipeline.cache.zarr_view import Layout, Rooms, ZarrView, array_specs, chunk_file
from pipeline.errors import CacheError

T = TypeVar("T")

_KEY_ENCODING: Any = {"name": "default", "separator": "."}  # one flat folder an array: one fsync a shard, not five
_SHUFFLES: tuple[Any, ...] = ("noshuffle", "shuffle", "bitshuffle")


def _create_group(store: ZarrStoreBase, header: CacheHeader) -> None:
    group = zarr.create_group(store)
    for name, (shape, dtype, dimension_names) in array_specs(header).items():
        chunk = (header.samples_per_shard, *((1,) if len(shape) > 1 else ()), *shape[2:])
        layout: dict[str, Any] = {"chunks": chunk, "compressors": [Crc32cCodec()]}
        if name == "tokens" and header.compression is not None:
            layout = {"chunks": (1, 1, *shape[2:]), "shards": chunk, "compressors": [_blosc(header.compression)]}
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


def _blosc(compression: dict[str, Any]) -> BloscCodec:
    """zarr's codec for a numcodecs config, with every default made explicit."""
    try:
        codec = numcodecs.Blosc(**{key: value for key, value in compression.items() if key != "id"})
        shuffle = _SHUFFLES[codec.shuffle]
    except (TypeError, ValueError, IndexError) as error:
        raise CacheError(f"compression {compression} is no numcodecs config: {error}") from error
    return BloscCodec(cname=codec.cname, clevel=codec.clevel, shuffle=shuffle, blocksize=codec.blocksize)


class _DurableStore(LocalStore):
    """zarr's LocalStore, except that a chunk is durable before it has its name, and is measured on the way."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.written: dict[str, FileEntry] = {}

    async def set(self, key: str, value: Buffer) -> None:
        self.written[key] = await asyncio.to_thread(write_file, self.root / key, [value.as_buffer_like()])


class ZarrStore:
    """See `pipeline.cache.base.Store`."""

    stores_images = False

    def __init__(self, root: Path, header: CacheHeader) -> None:
        self._root, self._header = root, header
        self._specs, self._rooms = array_specs(header), Rooms(Layout(header))
        self.descriptors = sum(name in self._specs for name in ("tokens", "scale", "attention"))

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
        span, (store, targets) = self._header.shard_range(shard), self._targets
        arrays: dict[str, Any] = {
            "tokens": data.tokens,
            "scale": data.scale,
            "attention": data.attention,
            "box": data.box,
        }
        arrays |= {"hflip": data.hflip, "source_hash": data.source_hash, "crc32c": _checksums(span, data, seal)}
        arrays |= {"key": np.array(data.keys, dtype=object)}
        for name, target in targets.items():
            target[span.start : span.stop] = arrays[name]
            sync_folder(self._root / name)
        return {file: store.written.pop(file) for file in self.files(shard)}

    @cached_property
    def _targets(self) -> "tuple[_DurableStore, dict[str, zarr.Array[Any]]]":
        """The arrays, opened for writing once: eight files of metadata for each shard would be a waste."""
        store = _DurableStore(self._root)
        group, arrays = zarr.open_group(store, mode="r+", zarr_format=3), {}
        for name in self._specs:
            array = group[name]
            assert isinstance(array, zarr.Array)
            arrays[name] = array.with_config({"write_empty_chunks": True})
        return store, arrays

    def open_view(self, shard: int, view: int) -> "ZarrView":
        return ZarrView(self._root, self._header, shard, view, self._rooms)

    def scan(
        self, shard: int, view: int, rows: list[int], seal: Seal, seen: dict[str, FileEntry], fresh: bool = False
    ) -> Scan:
        return scan_chunks(self._root, self._header, shard, view, rows, seal, seen)

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


def _checksums(span: range, data: ShardData, seal: Seal) -> NDArray[np.uint32]:
    """crc32c of every record, [n, V]; 0 at tombstones."""
    views = data.hflip.shape[1]
    result = np.zeros((len(span), views), np.uint32)
    for row, index in enumerate(span):
        if index not in data.tombstones:
            for view in range(views):
                result[row, view] = seal(index, view, data.record(row, view))
    return result
