"""Where the values of a parquet column of bytes lie, and one of them by one read.

The values of a row group are often one page of ten megabytes, compressed. Snappy compresses each 64 KiB of a page for
itself, so a value is read and unpacked with the blocks that hold it. Pages of other codecs are unpacked whole. Formats:
https://parquet.apache.org/docs/file-format/, https://github.com/google/snappy/blob/main/format_description.txt.
"""

import os
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CODECS = ("UNCOMPRESSED", "SNAPPY", "ZSTD", "GZIP", "BROTLI")
_SNAPPY = CODECS.index("SNAPPY")
_BLOCK = 1 << 16  # bytes that snappy compresses together
_ELEMENT = 64  # bytes; a page of smaller elements on average takes too long to walk over, and is unpacked whole
_PAGES = 4  # that a process keeps, of those that are unpacked whole

_WINDOW, _LARGEST_HEADER = 4096, 64 << 20  # bytes that a page's header may take: mostly, and at all

_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3  # types of pages
_PLAIN, _INDEXED = 0, (2, 8)  # encodings

# What a page that isn't what was written may lead to.
_DAMAGES = (LookupError, ValueError, TypeError, ArithmeticError, RecursionError, struct.error)
_NO_HEADER = "it has a page without a sound header"
_WITHOUT_BYTES = (
    "a row has no image bytes, but a path at most: write it again with the images in it, as push_to_hub of the library "
    "datasets does"
)


class Damage(Exception):  # noqa: N818 - a fact about the file, turned into DataError where its name is known
    """What is wrong with a file, in words."""


class Page(NamedTuple):
    """Values side by side, as they are compressed. In a table each is a row of int64."""

    file: int  # its number among the files of a listing
    start: int  # of the compressed bytes in the file
    compressed: int  # bytes
    size: int  # bytes unpacked
    codec: int  # number in CODECS
    block: int  # the first of its entries in the table of blocks; -1: it is unpacked whole


def no_pages() -> NDArray[np.int64]:
    """A table of no pages."""
    return np.empty((0, len(Page._fields)), np.int64)


def no_blocks() -> NDArray[np.int64]:
    """A table of no blocks."""
    return np.empty(0, np.int64)


class Column(NamedTuple):
    """The values of a column in a row group.

    Attributes:
        pages: int64 [P, fields of `Page`]; file is 0.
        blocks: int64 [B], where each block of a page starts in the file, and where its last one ends.
        values: int64 [N, 3]: number of the page, start in it unpacked, length.
    """

    pages: NDArray[np.int64]
    blocks: NDArray[np.int64]
    values: NDArray[np.int64]


class Chunk(NamedTuple):
    """Where a column's values of a row group lie in an open file, by the file's own account."""

    descriptor: int
    start: int
    size: int  # bytes
    codec: str
    rows: int
    max_level: int  # the definition level of a value that is there


def walk_column(chunk: Chunk) -> Column:
    """Look through a column of a row group, page by page.

    Raises:
        Damage: it can't be read so, or a value is missing. OSError: the disk.
    """
    if chunk.codec not in CODECS:
        raise Damage(f"compression {chunk.codec} is not read: write it again with SNAPPY")
    try:
        column = _walk(chunk)
    except _DAMAGES as error:
        raise Damage(f"a page is damaged ({type(error).__name__})") from error
    if len(column.values) != chunk.rows:
        raise Damage(f"a row group has {len(column.values)} images in {chunk.rows} rows")
    return column


def _walk(chunk: Chunk) -> Column:
    pages, blocks, values = list[Page](), list[int](), list[NDArray[np.int64]]()
    dictionary: NDArray[np.int64] | None = None
    for page, header, kind in _pages(chunk):
        stored = _pread(chunk.descriptor, page.start, page.compressed)
        content = stored if CODECS[page.codec] == "UNCOMPRESSED" else _decompress(stored, page.size, page.codec)
        if kind == _DICTIONARY:
            dictionary = _plain(content, 0, header[1], len(pages))
        else:
            at = _check_levels(content, header[1], chunk.max_level) if kind == _DATA else 0
            if header[2] in _INDEXED and dictionary is not None:
                values.append(_looked_up(dictionary, _runs(content[at + 1 :], header[1], content[at])))
                continue  # the values are in the dictionary's page
            if header[2] != _PLAIN:
                raise Damage(f"its images have encoding {header[2]}, which is not read: write it again with PLAIN")
            values.append(_plain(content, at, header[1], len(pages)))
        starts = _snappy_blocks(stored, page.size) if page.codec == _SNAPPY else None
        pages.append(page if starts is None else page._replace(block=len(blocks)))
        blocks += [page.start + place for place in starts or ()]
    found = np.concatenate(values) if values else np.empty((0, 3), np.int64)
    return Column(np.array(pages, np.int64).reshape(-1, len(Page._fields)), np.array(blocks, np.int64), found)


def read_value(path: str, page: Page, blocks: NDArray[np.int64], start: int, length: int) -> bytes:
    """A value of `length` bytes at `start` of an unpacked page.

    Raises:
        OSError: the disk. Damage: the page is not what was compressed.
    """
    if CODECS[page.codec] == "UNCOMPRESSED":
        return _read(path, page.start + start, length)
    if page.block < 0:
        return _whole_page(path, page)[start : start + length]
    first, last = start // _BLOCK, (start + max(length, 1) - 1) // _BLOCK
    begin, end = int(blocks[page.block + first]), int(blocks[page.block + last + 1])
    size = min((last + 1) * _BLOCK, page.size) - first * _BLOCK
    content = _decompress(_varint_bytes(size) + _read(path, begin, end - begin), size, page.codec)
    return content[start - first * _BLOCK :][:length]


@lru_cache(_PAGES)
def _whole_page(path: str, page: Page) -> bytes:
    return _decompress(_read(path, page.start, page.compressed), page.size, page.codec)


def _read(path: str, start: int, length: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return _pread(file.fileno(), start, length)


def _pread(descriptor: int, start: int, length: int, exact: bool = True) -> bytes:
    data = os.pread(descriptor, length, start)
    while len(data) < length and (more := os.pread(descriptor, length - len(data), start + len(data))):
        data += more
    if exact and len(data) < length:
        raise Damage(f"it ends at byte {start + len(data)}, within its values")
    return data


def _decompress(stored: bytes, size: int, codec: int) -> bytes:
    import pyarrow

    try:
        content: bytes = pyarrow.decompress(stored, size, CODECS[codec].lower(), asbytes=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise Damage(f"a page is damaged ({' '.join(str(error).split())})") from error
    return content


def _pages(chunk: Chunk) -> Iterator[tuple[Page, dict[int, Any], int]]:
    """Each page of values, its own header (1: count, 2: encoding) and its type."""
    at, codec = chunk.start, CODECS.index(chunk.codec)
    while at < chunk.start + chunk.size:
        header, start = _header(chunk, at)
        kind, size, compressed = header[1], header[2], header[3]
        at = start + compressed
        if min(size, compressed) < 0:
            raise Damage(_NO_HEADER)
        if kind in (_DATA, _DICTIONARY):
            yield Page(0, start, compressed, size, codec, -1), header[5 if kind == _DATA else 7], kind
        elif kind == _DATA_V2:
            of_data = header[8]
            levels = of_data[5] + of_data[6]  # bytes, which are never compressed
            if of_data[2]:
                raise Damage(_WITHOUT_BYTES)
            packed = codec if of_data.get(7, True) else 0
            page = Page(0, start + levels, compressed - levels, size - levels, packed, -1)
            yield page, {1: of_data[1], 2: of_data[4]}, kind


def _header(chunk: Chunk, at: int) -> tuple[dict[int, Any], int]:
    """The header of the page at a byte of the file, and where it ends. It may hold whole images, as statistics."""
    for window in (_WINDOW, _LARGEST_HEADER):
        reader = _Compact(_pread(chunk.descriptor, at, min(window, chunk.start + chunk.size - at), exact=False))
        try:
            return reader.struct(), at + reader.at
        except Damage:
            if window == _LARGEST_HEADER:
                raise
    raise AssertionError


def _check_levels(content: bytes, count: int, max_level: int) -> int:
    """Where the values of a page begin. Raises Damage: one of them is missing."""
    if max_level == 0:
        return 0
    end = 4 + int.from_bytes(content[:4], "little")
    if (_runs(content[4:end], count, max_level.bit_length()) != max_level).any():
        raise Damage(_WITHOUT_BYTES)
    return end


def _looked_up(dictionary: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    if len(numbers) and int(numbers.max()) >= len(dictionary):
        raise Damage("an image is outside its dictionary")
    return dictionary[numbers]


def _plain(content: bytes, at: int, count: int, page: int) -> NDArray[np.int64]:
    """Places [count, 3] of values that each follow their length."""
    if not 0 <= count <= len(content) // 4:
        raise Damage("an image ends behind its page")
    places = np.empty((count, 3), np.int64)
    for number in range(count):
        length = int.from_bytes(content[at : at + 4], "little")
        places[number] = page, at + 4, length
        at += 4 + length
    if at > len(content):
        raise Damage("an image ends behind its page")
    return places


def _runs(content: bytes, count: int, width: int) -> NDArray[np.int64]:
    """`count` numbers of `width` bits, in runs of one number or packed by eight."""
    if width == 0:
        return np.zeros(count, np.int64)
    found, total, at = list[NDArray[np.int64]](), 0, 0
    while total < count:
        header, at = _varint(content, at)
        if header & 1:
            size = (header >> 1) * width
            packed = np.frombuffer(content, np.uint8, size, at)
            bits = np.unpackbits(packed, bitorder="little").reshape(-1, width).astype(np.int64)
            numbers = bits @ (1 << np.arange(width))
        else:
            size = (width + 7) // 8
            numbers = np.full(min(header >> 1, count - total), int.from_bytes(content[at : at + size], "little"))
        found.append(numbers)
        total, at = total + len(numbers), at + size
    return np.concatenate(found)[:count] if found else np.empty(0, np.int64)


def _snappy_blocks(stored: bytes, size: int) -> list[int] | None:
    """Where each block of a snappy stream starts, and where the last one ends; None: it is not made of such blocks."""
    _, at = _varint(stored, 0)
    starts, position, elements = [at], 0, size // _ELEMENT + 1024
    while at < len(stored):
        tag = stored[at]
        kind, length = tag & 3, (tag >> 2) + 1
        if kind == 0:
            extra = max(0, length - 60)  # bytes of a length that doesn't fit in the tag
            if extra:
                length = int.from_bytes(stored[at + 1 : at + 1 + extra], "little") + 1
            at += 1 + extra + length
        elif kind == 1:
            length, at = (tag >> 2 & 7) + 4, at + 2
        else:
            at += 3 if kind == 2 else 5
        position, elements = position + length, elements - 1
        boundary = len(starts) * _BLOCK
        if position >= boundary or at >= len(stored):
            if position != min(boundary, size) or elements < 0:
                return None
            starts.append(at)
    return starts


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, and where it ends."""
    number = shift = 0
    while True:
        if at >= len(content):
            raise Damage("it ends within a number")
        byte = content[at]
        number, shift, at = number | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return number, at


def _varint_bytes(number: int) -> bytes:
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


class _Compact:
    """Reads Thrift's compact protocol, as far as headers of pages use it.

    https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
    """

    def __init__(self, content: bytes) -> None:
        self._content, self.at = content, 0

    def struct(self) -> dict[int, Any]:
        """A struct's values by the numbers of its fields."""
        fields, number = dict[int, Any](), 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            kind = head & 15
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind)
        return fields

    def _value(self, kind: int) -> Any:
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 7:
            return struct.unpack("<d", self._bytes(8))[0]
        if kind == 8:
            return self._bytes(self._number())
        if kind in (9, 10):
            head = self._byte()
            count = self._number() if head >> 4 == 15 else head >> 4
            return [self._value(3 if head & 15 in (1, 2) else head & 15) for _ in range(count)]
        if kind == 12:
            return self.struct()
        raise Damage(_NO_HEADER)

    def _byte(self) -> int:
        return self._bytes(1)[0]

    def _bytes(self, count: int) -> bytes:
        self.at += count
        if self.at > len(self._content):
            raise Damage("it ends within the header of a page")
        return self._content[self.at - count : self.at]

    def _number(self) -> int:
        number, self.at = _varint(self._content, self.at)
        return number

    def _signed(self) -> int:
        number = self._number()
        return number >> 1 ^ -(number & 1)
