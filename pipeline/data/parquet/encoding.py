"""The bytes of parquet pages: numbers in runs, Thrift's headers, and snappy's blocks."""

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 16  # bytes that snappy compresses together
NO_HEADER = "it has a page without a sound header"
_ELEMENT = 64  # bytes; a page of smaller elements on average takes too long to walk over, and is unpacked whole


class Damage(Exception):  # noqa: N818 - a fact about the file, turned into DataError where its name is known
    """What is wrong with a file, in words."""


def runs_of(content: bytes, count: int, width: int) -> NDArray[np.int64]:
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


def snappy_blocks(stored: bytes, size: int) -> list[int] | None:
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
            reach, at = 0, at + 1 + extra + length
        elif kind == 1:
            reach = (tag >> 5) << 8 | stored[at + 1]
            length, at = (tag >> 2 & 7) + 4, at + 2
        else:
            after = at + (3 if kind == 2 else 5)
            reach, at = int.from_bytes(stored[at + 1 : after], "little"), after
        if reach > position - (len(starts) - 1) * BLOCK:  # a copy from an earlier block
            return None
        position, elements = position + length, elements - 1
        boundary = len(starts) * BLOCK
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


def varint_bytes(number: int) -> bytes:
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


class Compact:
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
        raise Damage(NO_HEADER)

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
