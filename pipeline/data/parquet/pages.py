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

from pipeline.data.parquet.encoding import BLOCK, NO_HEADER, Compact, Damage, runs_of, snappy_blocks, varint_bytes

CODECS = ("UNCOMPRESSED", "SNAPPY", "ZSTD", "GZIP", "BROTLI")
_SNAPPY = CODECS.index("SNAPPY")
_PAGES = 4  # that a process keeps, of those that are unpacked whole

_WINDOW, _LARGEST_HEADER = 4096, 64 << 20  # bytes that a page's header may take: mostly, and at all

_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3  # types of pages
_PLAIN, _INDEXED = 0, (2, 8)  # encodings

# What a page or a footer that isn't what was written may lead to.
DAMAGES = (LookupError, ValueError, TypeError, ArithmeticError, RecursionError, struct.error)
_WITHOUT_BYTES = (
    "a row has no image bytes, but a path at most: write it again with the images in it, as push_to_hub of the library "
    "datasets does"
)


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
    except DAMAGES as error:
        raise Damage(f"a page is damaged ({type(error).__name__})") from error
    if len(column.values) != chunk.rows:
        raise Damage(f"a row group has {len(column.values)} images in {chunk.rows} rows")
    return column


def _walk(chunk: Chunk) -> Column:
    pages, blocks, values = list[Page](), list[int](), list[NDArray[np.int64]]()
    dictionary: NDArray[np.int64] | None = None
    for page, header, kind in _pages(chunk):
        stored = pread(chunk.descriptor, page.start, page.compressed)
        content = stored if CODECS[page.codec] == "UNCOMPRESSED" else _decompress(stored, page.size, page.codec)
        if kind == _DICTIONARY:
            dictionary = _plain(content, 0, header[1], len(pages))
        else:
            at = _check_levels(content, header[1], chunk.max_level) if kind == _DATA else 0
            if header[2] in _INDEXED and dictionary is not None:
                values.append(_looked_up(dictionary, runs_of(content[at + 1 :], header[1], content[at])))
                continue  # the values are in the dictionary's page
            if header[2] != _PLAIN:
                raise Damage(f"its images have encoding {header[2]}, which is not read: write it again with PLAIN")
            values.append(_plain(content, at, header[1], len(pages)))
        starts = snappy_blocks(stored, page.size) if page.codec == _SNAPPY else None
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
    first, last = start // BLOCK, (start + max(length, 1) - 1) // BLOCK
    begin, end = int(blocks[page.block + first]), int(blocks[page.block + last + 1])
    size = min((last + 1) * BLOCK, page.size) - first * BLOCK
    content = _decompress(varint_bytes(size) + _read(path, begin, end - begin), size, page.codec)
    return content[start - first * BLOCK :][:length]


@lru_cache(_PAGES)
def _whole_page(path: str, page: Page) -> bytes:
    return _decompress(_read(path, page.start, page.compressed), page.size, page.codec)


def _read(path: str, start: int, length: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return pread(file.fileno(), start, length)


def pread(descriptor: int, start: int, length: int, exact: bool = True) -> bytes:
    """Bytes of an open file from `start` on. Raises Damage: it ends before, where they must be `exact`."""
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
            raise Damage(NO_HEADER)
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
        reader = Compact(pread(chunk.descriptor, at, min(window, chunk.start + chunk.size - at), exact=False))
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
    if (runs_of(content[4:end], count, max_level.bit_length()) != max_level).any():
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
