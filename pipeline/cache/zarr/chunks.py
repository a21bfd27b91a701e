"""The bytes of the zarr store's chunk files, exactly as zarr itself writes them; a test compares the two.

Writing them without zarr saves two copies of every chunk.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from awscrt.checksums import crc32c

from pipeline.cache.files import BLOCK, CHECKSUM_BYTES, checksum
from pipeline.errors import CacheDamage


def raw_chunk(rows: Iterable[Any], padding: int) -> Iterator[Any]:
    """A chunk of numbers: the rows (contiguous arrays), `padding` zero bytes, and the crc32c of it all."""
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


def parse_texts(payload: bytes, count: int, name: str) -> list[bytes]:
    """The strings (UTF-8) of a vlen-utf8 chunk, its crc32c cut off.

    Raises:
        CacheDamage: it doesn't hold `count` strings.
    """
    # No key holds a NUL, so lengths under 256 show as three of them: splitting there is ten times faster.
    pieces = payload[4:].split(b"\0\0\0")
    if len(pieces) == count + 1 and b"\0\0\0\0" not in payload[4:]:  # four of them: an empty string
        return [*(piece[:-1] for piece in pieces[1:-1]), pieces[-1]]
    texts, position = [], 4
    for _ in range(count):
        start = position + 4
        position = start + int.from_bytes(payload[position:start], "little")
        texts.append(payload[start:position])
    if int.from_bytes(payload[:4], "little") != count or position != len(payload):
        raise CacheDamage(f"{name} doesn't hold {count} strings")
    return texts


def _uint32(value: int) -> bytes:
    return value.to_bytes(4, "little")
