"""Reading the zarr store's chunk files raw: a chunk is the plain array and its crc32c, so `pread` fetches a record."""

import threading
from collections.abc import Sequence
from struct import Struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.files import aligned
from pipeline.cache.format.header import CacheHeader
from pipeline.cache.format.records import TAIL, TAILS, Raw, RecordFile


def array_specs(header: CacheHeader) -> dict[str, tuple[tuple[int, ...], str, tuple[str, ...]]]:
    """Arrays of the group: name → (shape, dtype, dimension names). Those of 2 dimensions or more run over views."""
    N, V, R, D = header.count, header.views, header.rows, header.stored_dim
    items = "channel" if header.dim == D else "pair of channels"
    specs: dict[str, tuple[tuple[int, ...], str, tuple[str, ...]]] = {
        "tokens": ((N, V, R, D), header.quantiser.dtype.name, ("sample", "view", "token", items)),
        "box": ((N, V, 4), "int32", ("sample", "view", "edge")),
        "hflip": ((N, V), "uint8", ("sample", "view")),
        "crc32c": ((N, V), "uint32", ("sample", "view")),
        "source_hash": ((N,), "uint64", ("sample",)),
        "key": ((N,), "str", ("sample",)),
    }
    if header.quantiser.has_scale:
        specs["scale"] = ((N, V, R), "float16", ("sample", "view", "token"))
    if header.attention_shape is not None:
        names = ("sample", "view", "head", "token") if header.attention == "heads" else ("sample", "view", "token")
        specs["attention"] = ((N, V, *header.attention_shape), "float16", names)
    return specs


def chunk_file(name: str, shard: int, view: int, dimensions: int) -> str:
    """The chunk of one shard and view; arrays of one dimension have no views."""
    numbers = [shard, *((view,) if dimensions > 1 else ()), *(0 for _ in range(dimensions - 2))]
    return f"{name}/c." + ".".join(map(str, numbers))


class Layout:
    """Tokens, scale and attention of one record side by side, as its checksum covers them."""

    def __init__(self, header: CacheHeader) -> None:
        half, R = np.dtype("<f2"), header.rows
        kinds: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            "tokens": (header.quantiser.dtype, (R, header.stored_dim))
        }
        if header.quantiser.has_scale:
            kinds["scale"] = (half, (R,))
        if header.attention_shape is not None:
            kinds["attention"] = (half, header.attention_shape)
        self.names, self.bytes = tuple(kinds), 0
        self.places: dict[str, tuple[tuple[int, ...], np.dtype[Any], int, int]] = {}  # shape, dtype, start, stop
        for name, (dtype, shape) in kinds.items():
            size = int(np.prod(shape)) * dtype.itemsize
            self.places[name] = (shape, dtype, self.bytes, self.bytes + size)
            self.bytes += size


class RecordBuffer:
    """Memory for one record of a layout."""

    __slots__ = ("attention", "body", "parts", "scale", "tokens")

    def __init__(self, layout: Layout) -> None:
        content = aligned(layout.bytes)
        arrays = {name: np.ndarray(shape, dtype, content, at) for name, (shape, dtype, at, _) in layout.places.items()}
        self.tokens: NDArray[Any] = arrays["tokens"]
        self.scale, self.attention = arrays.get("scale"), arrays.get("attention")
        # For each file: where its bytes go, and how many there are.
        self.parts = [((content[start:stop],), stop - start) for _, _, start, stop in layout.places.values()]
        self.body = (content,)


class ThreadBuffer(threading.local):
    """A buffer for each thread, used again for every record that isn't kept: the CPU's cache still holds it."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.record = RecordBuffer(layout)


class ZarrView:
    """One view of one shard: the large arrays as open files, and the tables with the small ones."""

    __slots__ = ("_buffer", "_files", "_shared", "_table")

    def __init__(self, files: Sequence[RecordFile], shared: Any, table: Any, buffer: ThreadBuffer) -> None:
        self._files, self._shared, self._table, self._buffer = files, shared, table, buffer

    def expect(self, row: int) -> None:
        for file, (_, size) in zip(self._files, self._buffer.record.parts, strict=True):
            file.expect(size, row * size)

    def read(self, row: int, keep: bool = True) -> Raw:
        tail, crc32c = _ENTRY.unpack_from(self._table, row * _ENTRY.size)
        start, stop = _SPAN.unpack_from(self._shared, row * _START)
        buffer = RecordBuffer(self._buffer.layout) if keep else self._buffer.record
        for file, (part, size) in zip(self._files, buffer.parts, strict=True):
            file.read_parts(part, size, row * size)
        key = bytes(self._shared[start:stop])
        return Raw(key, tail, crc32c, buffer.tokens, buffer.scale, buffer.attention, None, buffer.body)


_ENTRY = Struct(f"<{TAIL.size}sI")  # TAIL and crc32c of a record, for one lookup
_ENTRIES: np.dtype[Any] = np.dtype([("tail", TAILS), ("crc32c", "<u4")])  # the same for numpy
_SPAN, _START = Struct("<II"), 4  # where a key starts and stops: the next one's start


def table_sizes(rows: int) -> dict[str, int]:
    """Bytes of the small chunks that `entry_table` takes, without their checksums."""
    return {"box": 16 * rows, "hflip": rows, "source_hash": 8 * rows, "crc32c": 4 * rows}


def entry_table(chunks: dict[str, bytes]) -> bytes:
    """The table of one view, an entry for each row, of its small chunks."""
    rows = np.empty(len(chunks["hflip"]), _ENTRIES)
    rows["tail"]["box"] = np.frombuffer(chunks["box"], "<i4").reshape(-1, 4)
    rows["tail"]["hflip"] = np.frombuffer(chunks["hflip"], "u1")
    rows["tail"]["source_hash"] = np.frombuffer(chunks["source_hash"], "<u8")
    rows["crc32c"] = np.frombuffer(chunks["crc32c"], "<u4")
    return rows.tobytes()


def key_table(keys: list[bytes]) -> bytes:
    """The table that all views of a shard share: where each key starts, where the last one stops, and the keys."""
    starts = np.cumsum([_START * (len(keys) + 1), *map(len, keys)], dtype="<u4")
    return starts.tobytes() + b"".join(keys)
