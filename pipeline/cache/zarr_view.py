"""Reading the zarr store's chunk files raw: a chunk is the plain array and its crc32c, so a record is one `pread`."""

import threading
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
from numpy.typing import NDArray

from pipeline.cache.base import TAIL, TAILS, Raw
from pipeline.cache.files import CHECKSUM_BYTES, Descriptor, aligned, check_table, file_of, read_table
from pipeline.cache.manifest import CacheHeader
from pipeline.errors import CacheDamage


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


def chunk_file(name: str, shard: int, view: int, dimensions: int) -> str:
    """The chunk of one shard and view; arrays of one dimension have no views."""
    where = [shard, *((view,) if dimensions > 1 else ()), *(0 for _ in range(dimensions - 2))]
    return f"{name}/c." + ".".join(map(str, where))


class Layout:
    """Tokens, scale and attention of one record side by side, as its checksum covers them."""

    def __init__(self, header: CacheHeader) -> None:
        half, L = np.dtype("<f2"), header.tokens
        kinds: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {"tokens": (header.quantiser.dtype, (L, header.dim))}
        if header.quantiser.has_scale:
            kinds["scale"] = (half, (L,))
        if header.attention_shape is not None:
            kinds["attention"] = (half, header.attention_shape)
        self.names, self.bytes = tuple(kinds), 0
        self.places: dict[str, tuple[tuple[int, ...], np.dtype[Any], int, int]] = {}  # shape, dtype, start, stop
        for name, (dtype, shape) in kinds.items():
            size = int(np.prod(shape)) * dtype.itemsize
            self.places[name] = (shape, dtype, self.bytes, self.bytes + size)
            self.bytes += size


class Room:
    """Memory for one record, laid out so."""

    __slots__ = ("attention", "body", "parts", "scale", "tokens")

    def __init__(self, layout: Layout) -> None:
        content = aligned(layout.bytes)
        arrays = {name: np.ndarray(shape, dtype, content, at) for name, (shape, dtype, at, _) in layout.places.items()}
        self.tokens: NDArray[Any] = arrays["tokens"]
        self.scale, self.attention = arrays.get("scale"), arrays.get("attention")
        # For each file: where its bytes go, and how many there are.
        self.parts = [((content[start:stop],), stop - start) for _, _, start, stop in layout.places.values()]
        self.body = (content,)


class Rooms(threading.local):
    """One room for each thread, used again for every record that isn't kept: the CPU's cache still holds it."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.own = Room(layout)


class ZarrView:
    """One view of one shard: the large arrays as open files, the small ones in memory (about 100 bytes a sample)."""

    def __init__(self, root: Path, header: CacheHeader, shard: int, view: int, rooms: Rooms) -> None:
        paths = {
            name: file_of(root, chunk_file(name, shard, view, len(shape)))
            for name, (shape, _, _) in array_specs(header).items()
        }
        S = header.samples_per_shard
        self._rooms = rooms
        self._packed = None if header.compression is None else PackedRows(paths["tokens"], S)
        plain = rooms.layout.names if self._packed is None else rooms.layout.names[1:]
        self._files = [Descriptor(paths[name]) for name in plain]
        tables = {name: read_table(paths[name], size) for name, size in table_sizes(S).items()}
        self._tails = tails_of(tables).tobytes()
        self._crc = memoryview(np.frombuffer(tables["crc32c"], "<u4").astype(np.uint32).tobytes()).cast("I")
        self._keys = parse_strings(read_table(paths["key"]), S, paths["key"].name)

    def read(self, row: int, keep: bool = True) -> Raw:
        room = Room(self._rooms.layout) if keep else self._rooms.own
        parts = room.parts
        if self._packed is not None:
            self._packed.read_into(room.tokens, row)
            parts = parts[1:]
        for file, (part, size) in zip(self._files, parts, strict=True):
            file.read_parts(part, size, row * size)
        return Raw(
            self._keys[row],
            self._tails[row * TAIL.size : (row + 1) * TAIL.size],
            self._crc[row],
            room.tokens,
            room.scale,
            room.attention,
            None,
            room.body,
        )

    def key(self, row: int) -> str:
        return self._keys[row].decode()


class PackedRows:
    """Tokens in zarr's sharding codec: inner chunks, one a record, then an index of (offset, length) and its crc32c."""

    def __init__(self, path: Path, rows: int) -> None:
        self._file = Descriptor(path)
        self._end = self._file.size() - rows * 16 - CHECKSUM_BYTES
        if self._end < 0:
            raise CacheDamage(f"{path.name} is shorter than its index")
        index = check_table(path, self._file.read_from(self._end))
        self._index = np.frombuffer(index, "<u8").reshape(rows, 2)
        self._codec = numcodecs.Blosc()

    def read_into(self, tokens: NDArray[Any], row: int) -> None:
        """Decompress one record's tokens."""
        offset, length = self._index[row].tolist()
        if not 0 < length <= self._end - offset:
            raise CacheDamage(f"{self._file.path.name}: row {row} lies outside the file")
        packed = np.empty(length, np.uint8)
        self._file.read_into(packed, offset)
        try:
            self._codec.decode(packed, tokens)
        except (RuntimeError, ValueError) as error:
            raise CacheDamage(f"{self._file.path.name}: row {row} doesn't decompress") from error


def table_sizes(rows: int) -> dict[str, int]:
    """Bytes of the small chunks that go into memory, without their checksums."""
    return {"box": 16 * rows, "hflip": rows, "source_hash": 8 * rows, "crc32c": 4 * rows}


def tails_of(tables: dict[str, bytes]) -> NDArray[Any]:
    """Box, hflip and source hash of every row, as records' checksums cover them: [S] of TAILS."""
    tails = np.empty(len(tables["hflip"]), TAILS)
    tails["box"] = np.frombuffer(tables["box"], "<i4").reshape(-1, 4)
    tails["hflip"] = np.frombuffer(tables["hflip"], "u1")
    tails["source_hash"] = np.frombuffer(tables["source_hash"], "<u8")
    return tails


def parse_strings(payload: bytes, count: int, name: str) -> list[bytes]:
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
