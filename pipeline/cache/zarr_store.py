"""Targets as one Zarr v3 group: `zarr.open(path)["tokens"][i, v]` works for anyone; we read the chunk files raw.

Every array has one chunk for each (shard, view), uncompressed and followed by its crc32c. Such a file is the plain
array, so one `pread` fetches a record: thousands of times faster than decoding a chunk for each sample. Compressed
tokens use zarr's sharding instead, one inner chunk a record, at the price of a decompression for each read.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numcodecs
import numpy as np
import xxhash
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store as ZarrStoreBase
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore, MemoryStore

from pipeline.cache.base import TAIL, Raw, Seal, ShardData
from pipeline.cache.files import (
    CHECKSUM_BYTES,
    Descriptor,
    FileEntry,
    check_table,
    cut_table,
    file_of,
    one_line,
    read_table,
    read_whole,
    sync_folder,
    write_file,
)
from pipeline.cache.manifest import CacheHeader
from pipeline.errors import CacheDamage, CacheError

T = TypeVar("T")

_KEY_ENCODING: Any = {"name": "default", "separator": "."}  # one flat folder an array: one fsync a shard, not five
_SHUFFLES: tuple[Any, ...] = ("noshuffle", "shuffle", "bitshuffle")
_TAILS: np.dtype[Any] = np.dtype(
    [("box", "<i4", 4), ("hflip", "u1"), ("source_hash", "<u8")]
)  # rows of the struct TAIL
_BLOCK_ROWS = 2  # rows that a scan holds at once: they stay in the CPU's cache between hash and checksum


def array_specs(header: CacheHeader) -> dict[str, tuple[tuple[int, ...], str, tuple[str, ...]]]:
    """Arrays of the group: name → (shape, dtype, dimension names). Those of 2 dimensions or more run over views."""
    N, V, L, D = header.count, header.views, header.tokens, header.dim
    specs: dict[str, tuple[tuple[int, ...], str, tuple[str, ...]]] = {
        "tokens": ((N, V, L, D), header.quantiser.dtype.name, ("sample", "view", "token", "channel")),
        "box": ((N, V, 4), "int32", ("sample", "view", "edge")),
        "hflip": ((N, V), "uint8", ("sample", "view")),
        "crc32c": ((N, V), "uint32", ("sample", "view")),
        "source_hash": ((N,), "uint64", ("sample",)),
        "key": ((N,), "str", ("sample",)),
    }
    if header.quantiser.has_scale:
        specs["scale"] = ((N, V, L), "float16", ("sample", "view", "token"))
    if header.attention_shape is not None:
        names = ("sample", "view", "head", "token") if header.attention == "heads" else ("sample", "view", "token")
        specs["attention"] = ((N, V, *header.attention_shape), "float16", names)
    return specs


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
        self._specs = array_specs(header)
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

    @cached_property
    def _metadata(self) -> dict[str, bytes]:
        """Every zarr.json, as zarr itself writes it."""
        memory: dict[str, Buffer] = {}
        _create_group(MemoryStore(memory), self._header)
        return {key: value.to_bytes() for key, value in memory.items()}

    def files(self, shard: int) -> list[str]:
        return [
            _chunk(name, shard, view, len(shape))
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
        return ZarrView(self._root, self._header, shard, view)

    def scan(
        self, shard: int, view: int, rows: list[int], seen: dict[str, FileEntry], fresh: bool = False
    ) -> Iterator[tuple[int, Raw | CacheDamage]]:
        # The files' own checksums are left aside: `seen` shows a damaged file, and each record its own damage.
        tokens_file, loaded = _chunk("tokens", shard, view, 4), dict[str, bytes]()
        for name, (shape, _, _) in self._specs.items():
            file = _chunk(name, shard, view, len(shape))
            if file != tokens_file:
                loaded[name] = content = read_whole(file_of(self._root, file))
                seen[file] = FileEntry(bytes=len(content), xxh3_128=xxhash.xxh3_128_hexdigest(content))
        opened = ZarrView(self._root, self._header, shard, view, loaded)
        if self._header.compression is not None:
            yield from ((row, _attempt(opened.read, row)) for row in rows)
            return
        wanted, hasher, tokens, S = frozenset(rows), xxhash.xxh3_128(), opened.file_rows, self._header.samples_per_shard
        for start in range(0, S, _BLOCK_ROWS):
            block = _attempt(tokens.block, start, min(start + _BLOCK_ROWS, S))
            if not isinstance(block, CacheDamage):
                hasher.update(block.data)
            for row in filter(wanted.__contains__, range(start, min(start + _BLOCK_ROWS, S))):
                yield row, _attempt(opened.read, row, None if isinstance(block, CacheDamage) else block[row - start])
        hasher.update(tokens.file.read_from(S * tokens.bytes))
        seen[tokens_file] = FileEntry(bytes=tokens.file.size(), xxh3_128=hasher.hexdigest())

    def uncovered(self, shard: int | None, thorough: bool) -> dict[str, str]:
        problems = {}
        for file, expected in self._metadata.items() if shard is None else ():
            path = file_of(self._root, file)
            if not path.is_file():
                problems[file] = "is missing"
            elif not _same_json(path.read_bytes(), expected):
                problems[file] = "is not what this cache's header asks for"
        return problems

    def derived(self) -> set[str]:
        return set(self._metadata)

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


def _chunk(name: str, shard: int, view: int, dimensions: int) -> str:
    where = [shard, *((view,) if dimensions > 1 else ()), *(0 for _ in range(dimensions - 2))]
    return f"{name}/c." + ".".join(map(str, where))


def _checksums(span: range, data: ShardData, seal: Seal) -> NDArray[np.uint32]:
    """crc32c of every record, [n, V]; 0 at tombstones."""
    views = data.hflip.shape[1]
    result = np.zeros((len(span), views), np.uint32)
    for row, index in enumerate(span):
        if index not in data.tombstones:
            for view in range(views):
                result[row, view] = seal(index, view, data.record(row, view))
    return result


class ZarrView:
    """One view of one shard: the large arrays as open files, the small ones in memory (about 100 bytes a sample).

    `loaded` gives the whole content of the small files and of `scale` and `attention`, for a scan that has read them;
    their own checksums aren't looked at then.
    """

    def __init__(
        self, root: Path, header: CacheHeader, shard: int, view: int, loaded: dict[str, bytes] | None = None
    ) -> None:
        specs, S = array_specs(header), header.samples_per_shard

        def path(name: str) -> Path:
            return file_of(root, _chunk(name, shard, view, len(specs[name][0])))

        def content(name: str, size: int | None = None) -> bytes:
            return read_table(path(name), size) if loaded is None else cut_table(path(name), loaded[name], size)

        def table(name: str, dtype: str, *shape: int) -> NDArray[Any]:
            size = S * int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize
            return np.frombuffer(content(name, size), dtype).reshape(S, *shape)

        def rows(name: str, shape: tuple[int, ...] | None) -> "_FileRows | NDArray[Any] | None":
            if name not in specs or shape is None:
                return None
            return _FileRows(path(name), np.dtype("<f2"), shape) if loaded is None else table(name, "<f2", *shape)

        tokens, dtype, shape = path("tokens"), header.quantiser.dtype, (header.tokens, header.dim)
        packed = header.compression is not None
        self._tokens = _PackedRows(tokens, dtype, shape, S) if packed else _FileRows(tokens, dtype, shape)
        self._scale = rows("scale", (header.tokens,))
        self._attention = rows("attention", header.attention_shape)
        tails = np.empty(S, _TAILS)
        tails["box"] = table("box", "<i4", 4)
        tails["hflip"] = table("hflip", "u1")
        tails["source_hash"] = table("source_hash", "<u8")
        self._tails = tails.tobytes()
        self._crc = memoryview(table("crc32c", "<u4").astype(np.uint32).tobytes()).cast("I")
        self._keys = _parse_strings(content("key"), S, path("key").name)

    def read(self, row: int, tokens: NDArray[Any] | None = None) -> Raw:
        """One record; `tokens` if the caller has read them already."""
        return Raw(
            self._keys[row],
            self._tails[row * TAIL.size : (row + 1) * TAIL.size],
            self._crc[row],
            self._tokens[row] if tokens is None else tokens,
            None if self._scale is None else self._scale[row],
            None if self._attention is None else self._attention[row],
            None,
        )

    def key(self, row: int) -> str:
        return self._keys[row].decode()

    @property
    def file_rows(self) -> "_FileRows":
        """The tokens file, uncompressed."""
        assert isinstance(self._tokens, _FileRows)
        return self._tokens


class _FileRows:
    """A chunk file as it is, indexed by row without being loaded: the array, then its crc32c."""

    def __init__(self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.file, self._dtype, self._shape = Descriptor(path), dtype, shape
        self.bytes = int(np.prod(shape)) * dtype.itemsize  # of one row
        self._block = np.empty((0, *shape), dtype)

    def __getitem__(self, row: int) -> NDArray[Any]:
        values = np.empty(self._shape, self._dtype)
        self.file.read_into(values, row * self.bytes)
        return values

    def block(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start to stop, [n, ...]; the next block overwrites them."""
        if len(self._block) < stop - start:
            self._block = np.empty((stop - start, *self._shape), self._dtype)
        block = self._block[: stop - start]
        self.file.read_into(block, start * self.bytes)
        return block


class _PackedRows:
    """Tokens in zarr's sharding codec: inner chunks, one a record, then an index of (offset, length) and its crc32c."""

    def __init__(self, path: Path, dtype: np.dtype[Any], shape: tuple[int, int], rows: int) -> None:
        self._file, self._dtype, self._shape = Descriptor(path), dtype, shape
        self._end = self._file.size() - rows * 16 - CHECKSUM_BYTES
        if self._end < 0:
            raise CacheDamage(f"{path.name} is shorter than its index")
        index = check_table(path, self._file.read_from(self._end))
        self._index = np.frombuffer(index, "<u8").reshape(rows, 2)
        self._codec = numcodecs.Blosc()

    def __getitem__(self, row: int) -> NDArray[Any]:
        offset, length = self._index[row].tolist()
        if not 0 < length <= self._end - offset:
            raise CacheDamage(f"{self._file.path.name}: row {row} lies outside the file")
        packed = np.empty(length, np.uint8)
        self._file.read_into(packed, offset)
        tokens = np.empty(self._shape, self._dtype)
        try:
            self._codec.decode(packed, tokens)
        except (RuntimeError, ValueError) as error:
            raise CacheDamage(f"{self._file.path.name}: row {row} doesn't decompress") from error
        return tokens


def _attempt(read: Callable[..., T], *arguments: Any) -> T | CacheDamage:
    try:
        return read(*arguments)
    except CacheDamage as error:
        return error


def _parse_strings(payload: bytes, count: int, name: str) -> list[bytes]:
    """The strings of a vlen-utf8 chunk: their count, then (length, bytes) each; numbers are uint32."""
    # No key holds a NUL, so lengths under 256 show as three of them: splitting there is ten times faster.
    quick = payload[4:].split(b"\0\0\0")
    if len(quick) == count + 1 and b"\0\0\0\0" not in payload[4:]:  # four of them: an empty string
        return [*(part[:-1] for part in quick[1:-1]), quick[-1]]
    strings, position = [], 4
    for _ in range(count):
        start = position + 4
        position = start + int.from_bytes(payload[position:start], "little")
        strings.append(payload[start:position])
    if int.from_bytes(payload[:4], "little") != count or position != len(payload):
        raise CacheDamage(f"{name} doesn't hold {count} strings")
    return strings
