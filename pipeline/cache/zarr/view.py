"""Reading the zarr store's chunk files raw: a chunk is the plain array and its crc32c, so a record is one `pread`."""

import threading
from collections.abc import Sequence
from struct import Struct
from typing import Any

import numcodecs
import numpy as np
from numpy.typing import NDArray

from pipeline.cache.files import CHECKSUM_BYTES, Descriptor, aligned, check_table
from pipeline.cache.format.header import CacheHeader
from pipeline.cache.format.records import TAIL, TAILS, Raw
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
    """One view of one shard: the large arrays as open files, and where its records stand in the small tables."""

    __slots__ = ("_entry", "_files", "_rooms", "_shared", "_table")

    def __init__(self, files: list[Descriptor], entry: Struct, shared: Any, table: Any, rooms: Rooms) -> None:
        self._files, self._entry, self._shared, self._table, self._rooms = files, entry, shared, table, rooms

    def read(self, row: int, keep: bool = True) -> Raw:
        tail, crc32c, *packed = self._entry.unpack_from(self._table, row * self._entry.size)
        room = Room(self._rooms.layout) if keep else self._rooms.own
        parts, files = room.parts, self._files
        if packed:
            read_packed(files[0], row, packed, room.tokens)
            parts, files = parts[1:], files[1:]
        for file, (part, size) in zip(files, parts, strict=True):
            file.read_parts(part, size, row * size)
        return Raw(self._key(row), tail, crc32c, room.tokens, room.scale, room.attention, None, room.body)

    def key(self, row: int) -> str:
        return self._key(row).decode()

    def _key(self, row: int) -> bytes:
        start, stop = _SPAN.unpack_from(self._shared, row * _START)
        return bytes(self._shared[start:stop])


# What an open view knows of a record, for one lookup: TAIL, crc32c, and of packed tokens their offset and length.
ENTRY, PACKED_ENTRY = Struct(f"<{TAIL.size}sI"), Struct(f"<{TAIL.size}sIQQ")
_ENTRIES: np.dtype[Any] = np.dtype([("tail", TAILS), ("crc32c", "<u4")])
_PACKED_ENTRIES: np.dtype[Any] = np.dtype([*_ENTRIES.descr, ("place", "<u8", 2)])
_SPAN, _START = Struct("<II"), 4  # where a key starts and stops: the next one's start


def entry_table(tables: dict[str, bytes], index: NDArray[Any] | None) -> bytes:
    """The table of one view: an entry for each row, from its small chunks and from the index of packed tokens."""
    rows = np.empty(len(tables["hflip"]), _ENTRIES if index is None else _PACKED_ENTRIES)
    rows["tail"], rows["crc32c"] = tails_of(tables), np.frombuffer(tables["crc32c"], "<u4")
    if index is not None:
        rows["place"] = index
    return rows.tobytes()


def key_table(keys: list[bytes]) -> bytes:
    """The table that all views of a shard share: where each key starts, where the last one stops, and the keys."""
    starts = np.cumsum([_START * (len(keys) + 1), *map(len, keys)], dtype="<u4")
    return starts.tobytes() + b"".join(keys)


_BLOSC = numcodecs.Blosc()  # decodes frames of any settings


def packed_index(file: Descriptor, rows: int) -> NDArray[np.uint64]:
    """Of tokens in zarr's sharding codec: offset and length of each record's frame, [rows, 2].

    Length 0 stands for those that lie outside the file. The file ends with this index and its crc32c.
    """
    end = file.size() - rows * 16 - CHECKSUM_BYTES
    if end < 0:
        raise CacheDamage(f"{file.path.name} is shorter than its index")
    index = np.frombuffer(check_table(file.path, file.read_from(end)), "<u8").reshape(rows, 2).copy()
    offsets, lengths = index.T
    index[(offsets > end) | (lengths > end - np.minimum(offsets, np.uint64(end))), 1] = 0
    return index


def read_packed(file: Descriptor, row: int, place: Sequence[int], tokens: NDArray[Any]) -> None:
    """Decompress one record's tokens from its place (offset, length)."""
    offset, length = place
    if length == 0:
        raise CacheDamage(f"{file.path.name}: row {row} lies outside the file")
    packed = np.empty(length, np.uint8)
    file.read_into(packed, offset)
    try:
        _BLOSC.decode(packed, tokens)
    except (RuntimeError, ValueError) as error:
        raise CacheDamage(f"{file.path.name}: row {row} doesn't decompress") from error


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
