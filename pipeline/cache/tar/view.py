"""Reading the webdataset store's tars: where records lie in them, and one record by one `pread`."""

import json
import struct
import threading
from pathlib import Path
from tarfile import BLOCKSIZE, RECORDSIZE, TarError, TarInfo
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json

from pipeline.cache.files import Descriptor, aligned
from pipeline.cache.format.header import CacheHeader
from pipeline.cache.format.records import TAIL, Raw, RecordFile
from pipeline.errors import CacheDamage

SUFFIXES = ("jpg", "safetensors", "json")  # members of a sample, in their order
FIELDS = 4  # of an index row: start of the first member's header, then the byte length of each member
_ROW = struct.Struct(f"={FIELDS}q")  # such a row in memory
NONE = -1  # start of a tombstone in the index
_OUTSIDE = -2  # start of a record that its tar is too short for
_LARGEST_MEMBER = 2 << 30  # bytes; a hole in a file may pretend to more than memory holds
_SAFETENSORS_TYPES = {"int8": "I8", "uint8": "U8", "uint16": "U16", "float16": "F16", "float32": "F32"}


class TensorLayout:
    """Where the tensors of one record lie in its safetensors file: the same for every record of a cache.

    Larger items come first, so that every tensor is aligned; there are no metadata entries.
    """

    def __init__(self, header: CacheHeader) -> None:
        half = np.dtype("<f2")
        self._specs: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            "tokens": (header.quantiser.dtype, (header.rows, header.stored_dim))
        }
        if header.quantiser.has_scale:
            self._specs["scale"] = (half, (header.rows,))
        if header.attention_shape is not None:
            self._specs["attention"] = (half, header.attention_shape)
        self._starts, entries, offset = dict[str, int](), {}, 0
        for name in sorted(self._specs, key=lambda name: -self._specs[name][0].itemsize):
            dtype, shape = self._specs[name]
            end = offset + int(np.prod(shape)) * dtype.itemsize
            entries[name] = {
                "dtype": _SAFETENSORS_TYPES[dtype.name],
                "shape": list(shape),
                "data_offsets": [offset, end],
            }
            self._starts[name], offset = offset, end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.head = struct.pack("<Q", len(text)) + text
        self.bytes = len(self.head) + offset
        self.facts = padded(self.bytes) + BLOCKSIZE  # from the file's start to the text of the JSON behind it
        # A checksum covers tokens, scale, attention in this order. The file has them so, but for tokens of one byte an
        # item, which it has last.
        tokens = len(self.head) + self._starts["tokens"]
        self.sealed = [span for span in ((tokens, self.bytes), (len(self.head), tokens)) if span[0] < span[1]]

    def write(self, raw: Raw) -> list[Any]:
        """The parts of a record's safetensors file."""
        arrays = {"tokens": raw.tokens, "scale": raw.scale, "attention": raw.attention}
        return [self.head, *(np.ascontiguousarray(arrays[name]) for name in self._starts)]

    def tensors(self, file: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Tokens, scale and attention as views of a safetensors file [bytes]."""
        return {
            name: np.ndarray(shape, dtype, file, len(self.head) + self._starts[name])
            for name, (dtype, shape) in self._specs.items()
        }


def trailer(offset: int) -> int:
    """Zero bytes at the end of a tar: two blocks, then as many as fill a record, as tar itself writes."""
    return 2 * BLOCKSIZE + -(offset + 2 * BLOCKSIZE) % RECORDSIZE


def padded(size: Any) -> Any:
    return size + -size % BLOCKSIZE


def index_of(tar: Descriptor, span: range) -> NDArray[np.int64]:
    """Make the index [n, 4] of a tar again by walking its headers.

    Raises:
        CacheDamage: something else than the samples of `span` in their order, three members each.
    """
    rows = np.full((len(span), FIELDS), NONE, np.int64)
    header, offset, end = np.empty(BLOCKSIZE, np.uint8), 0, tar.size()
    while True:
        tar.read_into(header, offset)
        if not header.any():
            break
        start, sizes, names = offset, [], []
        for _ in SUFFIXES:
            tar.read_into(header, offset)
            name, size = _parse_header(tar.path, header.tobytes(), offset)
            names.append(name)
            sizes.append(size)
            offset += BLOCKSIZE + padded(size)
        row = int(names[0][:9]) - span.start if names[0][:9].isdecimal() else NONE
        if not 0 <= row < len(span) or names != [f"{span[row]:09d}.{suffix}" for suffix in SUFFIXES]:
            raise CacheDamage(f"{tar.path.name}: unexpected members {', '.join(names)} at byte {start}")
        rows[row] = [start, *sizes]
    if end != offset + trailer(offset):
        raise CacheDamage(f"{tar.path.name} ends at byte {end} instead of {offset + trailer(offset)}")
    return rows


def _parse_header(path: Path, header: bytes, offset: int) -> tuple[str, int]:
    try:
        info = TarInfo.frombuf(header, "ascii", "strict")
    except (TarError, ValueError) as error:
        raise CacheDamage(f"{path.name}: no tar header at byte {offset}") from error
    if info.size < 0:
        raise CacheDamage(f"{path.name}: a member of negative size at byte {offset}")
    return info.name, info.size


class RecordBuffer:
    """Memory for one record: its image up to the end of the next header, and what lies behind."""

    __slots__ = ("attention", "back", "front", "head", "scale", "sealed", "tokens")

    def __init__(self, layout: TensorLayout, front: int = BLOCKSIZE, facts: int = BLOCKSIZE) -> None:
        back = aligned(layout.facts + facts)
        self.front, self.back = aligned(front).data, back.data  # slices of these cost half as much as an array's
        self.head = self.back[: len(layout.head)]
        self.sealed = [self.back[start:stop] for start, stop in layout.sealed]
        arrays = layout.tensors(back)
        self.tokens, self.scale, self.attention = arrays["tokens"], arrays.get("scale"), arrays.get("attention")


class ThreadBuffer(threading.local):
    """A buffer for each thread, used again for every record that isn't kept: the CPU's cache still holds it."""

    def __init__(self, layout: TensorLayout) -> None:
        self._layout = layout
        self._record = RecordBuffer(layout)

    def record(self, front: int, facts: int) -> RecordBuffer:
        """A buffer of so many bytes at least."""
        if len(self._record.front) < front or len(self._record.back) < self._layout.facts + facts:
            self._record = RecordBuffer(self._layout, front + front // 4, 2 * facts)
        return self._record


class TarView:
    """One tar, open for reading, with its index: the int64 of `within` in a buffer."""

    __slots__ = ("_buffer", "_layout", "_span", "_table", "_tar")

    def __init__(self, tar: RecordFile, table: Any, span: range, layout: TensorLayout, buffer: ThreadBuffer) -> None:
        self._tar, self._table, self._span, self._layout, self._buffer = tar, table, span, layout, buffer

    def expect(self, row: int) -> None:
        start, jpg, _, facts = _ROW.unpack_from(self._table, row * _ROW.size)
        if start >= 0:
            self._tar.expect(padded(jpg) + BLOCKSIZE + self._layout.facts + facts, start + BLOCKSIZE)

    def read(self, row: int, keep: bool = True) -> Raw:
        start, jpg, tensors, facts = _ROW.unpack_from(self._table, row * _ROW.size)
        if start < 0:
            problem = "ends before or within" if start == _OUTSIDE else "does not hold"
            raise CacheDamage(f"{self._tar.path.name} {problem} {self._span[row]:09d}")
        # The image's own header isn't read: a small record by a range costs a few percent less.
        layout, front = self._layout, jpg + -jpg % BLOCKSIZE + BLOCKSIZE
        if tensors != layout.bytes:
            raise CacheDamage(self._strange_head(row))
        back = layout.facts + facts
        buffer = RecordBuffer(layout, front, facts) if keep else self._buffer.record(front, facts)
        self._tar.read_parts((buffer.front[:front], buffer.back[:back]), front + back, start + BLOCKSIZE)
        if buffer.head.tobytes() != layout.head:
            raise CacheDamage(self._strange_head(row))
        key, tail, crc32c = self._parse_facts(row, buffer.back[layout.facts : back].tobytes())
        image = buffer.front[:jpg].tobytes()
        return Raw(key, tail, crc32c, buffer.tokens, buffer.scale, buffer.attention, image, (*buffer.sealed, image))

    def _strange_head(self, row: int) -> str:
        return f"{self._tar.path.name}: the safetensors header of {self._span[row]:09d} differs"

    def _parse_facts(self, row: int, content: bytes) -> tuple[bytes, bytes, int]:
        """A record's JSON → key, TAIL, crc32c."""
        try:
            facts = from_json(content)  # four times faster than json
            top, left, height, width = facts["box"]
            tail = TAIL.pack(top, left, height, width, facts["hflip"], facts["source_hash"])
            return facts["key"].encode(), tail, int(facts["crc32c"])
        except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
            raise CacheDamage(f"{self._tar.path.name}: {self._span[row]:09d}.json is not what was written") from error


def within(rows: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Index rows [n, 4], those that no tar of `size` bytes can hold marked as outside."""
    sizes = rows[:, 1:]
    sound = ((sizes >= 0) & (sizes <= min(size, _LARGEST_MEMBER))).all(1) & (rows[:, 0] >= 0) & (rows[:, 0] <= size)
    ends = rows[:, 0] + 3 * BLOCKSIZE + padded(sizes[:, 0]) + padded(sizes[:, 1]) + sizes[:, 2]
    result = rows.astype(np.int64)
    result[~(sound & (ends <= size)) & (rows[:, 0] != NONE), 0] = _OUTSIDE
    return result
