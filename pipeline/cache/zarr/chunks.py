"""The bytes of the zarr store's chunk files, exactly as zarr itself writes them; a test compares the two.

Writing them ourselves saves two copies of every chunk, and a block is checksummed, hashed and written while the CPU's
cache holds it.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numcodecs
import numpy as np
from awscrt.checksums import crc32c

from pipeline.cache.files import BLOCK, CHECKSUM_BYTES, checksum
from pipeline.errors import CacheError

_ABSENT = 2**64 - 1  # offset and length of an inner chunk that was never written


def raw_chunk(rows: Iterable[Any], padding: int) -> Iterator[Any]:
    """An uncompressed chunk: the rows (contiguous arrays), `padding` zero bytes, and the crc32c of it all."""
    crc = 0
    for row in rows:
        crc = crc32c(row, crc)
        yield row
    for size in [BLOCK] * (padding // BLOCK) + [padding % BLOCK]:
        zeros = bytes(size)
        crc = crc32c(zeros, crc)
        yield zeros
    yield crc.to_bytes(CHECKSUM_BYTES, "little")


def text_chunk(texts: list[str], rows: int) -> Iterator[bytes]:
    """A vlen-utf8 chunk, filled up to `rows` with empty strings: their count, then (length, bytes) each; its crc32c."""
    encoded = [text.encode() for text in texts] + [b""] * (rows - len(texts))
    payload = b"".join([_uint32(rows), *(part for text in encoded for part in (_uint32(len(text)), text))])
    yield payload
    yield checksum(payload)


def packed_chunk(rows: Iterable[Any], count: int, codec: numcodecs.Blosc) -> Iterator[bytes]:
    """A chunk in the sharding codec: a frame for each row, then `count` pairs of (offset, length), and their crc32c."""
    places, offset = np.full((count, 2), _ABSENT, "<u8"), 0
    for at, row in enumerate(rows):
        frame = bytes(codec.encode(np.ascontiguousarray(row)))
        places[at] = offset, len(frame)
        offset += len(frame)
        yield frame
    index = places.tobytes()
    yield index
    yield checksum(index)


def blosc(compression: dict[str, Any]) -> numcodecs.Blosc:
    """The codec of a numcodecs config. Raises CacheError for what is none."""
    try:
        codec = numcodecs.Blosc(**{key: value for key, value in compression.items() if key != "id"})
        codec.encode(bytes(64))  # only now it looks at its name and level
    except (TypeError, ValueError, RuntimeError) as error:
        raise CacheError(f"compression {compression} is no numcodecs config: {error}") from error
    if codec.shuffle not in range(3):
        raise CacheError(f"compression {compression}: shuffle must be 0 (none), 1 (bytes) or 2 (bits)")
    return codec


def _uint32(value: int) -> bytes:
    return value.to_bytes(4, "little")
