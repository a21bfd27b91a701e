"""A plain walk over the headers of a tar: where each file's bytes lie, without a Python object for each header.

`tarfile` gives the same names, sizes and offsets for five times the CPU time. Layout: POSIX.1-2008's ustar and pax,
https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html, with GNU tar's extensions for long names and sizes.
"""

import contextlib
import functools
import os
import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from pipeline.errors import DataError

_BLOCK = 512
_WINDOW = 4096  # bytes of one read: a header, a class number behind it and the next header come together
_CHECKSUM_BLANKS = 8 * ord(" ")  # a header's checksum is taken with its own eight bytes blank
_ADLER = 65521  # zlib.adler32's lower half is 1 + the sum of the bytes, modulo this
_TAIL = 1 << 20  # bytes behind the end mark that are read at once
_LARGEST_EXTENSION = 1 << 20  # bytes of a long name or of a pax record; more is no header

_FILE = frozenset(b"\x0007")
_NO_DATA = frozenset(b"123456")  # links, devices, folders and pipes: their size says nothing of what follows
_ANNOUNCING = frozenset(b"LKxXg")  # headers that say more of the next one
_LONG_NAME, _LONG_LINK, _GLOBAL, _SPARSE, _FOLDER = b"LKgS5"
_HARD_LINK, _SYMBOLIC_LINK = b"12"
_LINKS = frozenset((_HARD_LINK, _SYMBOLIC_LINK))
_NO_END = (
    "it has no end mark, so it was cut off or is still being written: copy or pack it again (where it is known to be "
    "whole, `head -c 1024 /dev/zero >> FILE` ends it)"
)
_CONTINUED = "another tar begins behind its end mark, at byte %d, as `cat A.tar B.tar` makes: name the tars one by one"
_NO_HEADER = "no header at byte %d: copy or pack it again"
_SPARSE_FILE = "%s is sparse: pack it without --sparse"
_PAX_RECORD = re.compile(rb"(\d+) ([^=]+)=")


class Member(NamedTuple):
    """A regular file in a tar."""

    name: bytes
    offset: int  # of its first byte
    size: int


class Link(NamedTuple):
    """A name for a file that has another name in the tar, or somewhere on a disk."""

    name: bytes
    target: bytes
    is_hard: bool


class _Damage(Exception):  # noqa: N818 - a fact about the file, turned into DataError where its name is known
    pass


@contextlib.contextmanager
def open_tar(path: str) -> Iterator["TarWalk"]:
    """A tar to walk over: `for member in tar`, and `tar.read(member)` on the way.

    Raises:
        DataError: it can't be read, is compressed, torn, damaged, without its end mark or holds sparse files.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):  # read ahead would bring in the images between the headers
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            yield TarWalk(file.fileno())
    except (_Damage, OSError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error
        raise DataError(f"data.path: {path} is not a sound WebDataset tar: {reason}") from error


class _Window:
    """Reads at any place, from a buffer where the last read went far enough."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._at, self._data = descriptor, 0, b""

    def __call__(self, at: int, size: int) -> bytes:
        """`size` bytes from `at` on, or as many as the file has."""
        start = at - self._at
        if start < 0 or start + size > len(self._data):
            self._at, self._data, start = at, self._read(at, max(size, _WINDOW)), 0
        return self._data[start : start + size]

    def _read(self, at: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, at)
        while len(data) < size and (more := os.pread(self._descriptor, size - len(data), at + len(data))):
            data += more
        return data


class TarWalk:
    """Each regular file and each link in the order of packing. Folders and devices are passed over."""

    def __init__(self, descriptor: int) -> None:
        facts = os.fstat(descriptor)
        self.stamp = facts.st_size, facts.st_mtime_ns  # as it was before it was read
        self._descriptor, self._length = descriptor, facts.st_size
        self._read = _Window(descriptor)

    def read(self, member: Member) -> bytes:
        return self._read(member.offset, member.size)

    @functools.cached_property
    def files(self) -> dict[bytes, Member]:
        """Each regular file by its name: what hard links point to. A walk of its own."""
        walk = TarWalk(self._descriptor)
        return {without_dot(member.name): member for member in walk if isinstance(member, Member)}

    def __iter__(self) -> Iterator[Member | Link]:
        if not self._length:
            raise _Damage("it is empty")
        at = 0
        always: dict[bytes, bytes] = {}  # pax records for all that follows
        once: dict[bytes, bytes] = {}  # for the next file; of several headers the first one counts
        is_announced = False  # whether the last header was about the next one
        while (header := self._read(at, _BLOCK)) and any(header):
            _check(header, at)
            kind, size, data = header[156], _number(header[124:136], at), at + _BLOCK
            is_announced = kind in _ANNOUNCING and kind != _GLOBAL
            if kind in _ANNOUNCING:
                once, always = self._extend(kind, data, size, once, always)
                at = data + -(-size // _BLOCK) * _BLOCK
                continue
            name, records = _name(header), always
            if kind == 0 and once.get(b"path", name).endswith(b"/"):
                kind = _FOLDER  # as tars of before 1988 have it
            if once or always:
                records = always | once
                name, size = _override(name, size, records, at)
                once = {}
            if size < 0 or kind == _SPARSE:
                raise _Damage(_SPARSE_FILE % _shown(name) if kind == _SPARSE else _NO_HEADER % at)
            at = data if kind in _NO_DATA else data + -(-size // _BLOCK) * _BLOCK
            if at > self._length:
                raise _Damage(f"it ends in the middle of {_shown(name)}: copy or pack it again")
            if kind in _FILE:
                yield Member(name, data, size)
            elif kind in _LINKS:
                target = records.get(b"linkpath") or header[157:257].partition(b"\0")[0]
                yield Link(name, target, kind == _HARD_LINK)
        if is_announced:
            raise _Damage("it ends behind the header of a long name: copy or pack it again")
        self._check_end(at, header)

    def _check_end(self, at: int, header: bytes) -> None:
        """Whether zeros end the tar and no other tar follows. Nothing else tells a torn one from a whole one."""
        if not header:
            raise _Damage(_NO_END)
        for start in range(at, self._length, _TAIL):
            tail = self._read(start, min(_TAIL, self._length - start))
            if any(tail):
                place = (len(tail) - len(tail.lstrip(b"\0"))) // _BLOCK * _BLOCK
                if _is_header(tail[place : place + _BLOCK]):
                    raise _Damage(_CONTINUED % (start + place))
                return

    def _extend(
        self, kind: int, data: int, size: int, once: dict[bytes, bytes], always: dict[bytes, bytes]
    ) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
        """What a header that stands before another one says of it, and of all that follow."""
        if not 0 <= size <= _LARGEST_EXTENSION:
            raise _Damage(_NO_HEADER % (data - _BLOCK))
        content = self._read(data, size)
        if len(content) < size:
            raise _Damage("it ends in the middle of a header: copy or pack it again")
        if kind == _LONG_NAME:
            return {b"path": content.partition(b"\0")[0]} | once, always
        if kind == _LONG_LINK:
            return {b"linkpath": content.partition(b"\0")[0]} | once, always
        records = _pax(content, data - _BLOCK)
        return (once, always | records) if kind == _GLOBAL else (records | once, always)


def _check(header: bytes, at: int) -> None:
    """Whether these 512 bytes are a header, by its checksum: of bytes without or, as some programs wrote, with sign."""
    if len(header) < _BLOCK:
        raise _Damage(_compressed(header, at) or "it ends in the middle of a header: copy or pack it again")
    field = header[148:156]
    try:
        expected = _number(field, at)
    except _Damage:
        raise _Damage(_compressed(header, at) or _NO_HEADER % at) from None
    checksum = expected - _CHECKSUM_BLANKS + sum(field)
    if zlib.adler32(header) & 0xFFFF == (checksum + 1) % _ADLER:
        return
    total = sum(header) - sum(field) + _CHECKSUM_BLANKS
    if expected != total - 256 * sum(byte > 127 for byte in header[:148] + header[156:]):
        raise _Damage(_compressed(header, at) or _NO_HEADER % at)


def _is_header(block: bytes) -> bool:
    try:
        _check(block, 1)
    except _Damage:
        return False
    return True


def _compressed(header: bytes, at: int) -> str | None:
    for name, magic in (("gzip", b"\x1f\x8b"), ("bzip2", b"BZh"), ("xz", b"\xfd7zXZ"), ("zstd", b"\x28\xb5\x2f\xfd")):
        if at == 0 and header.startswith(magic):
            return f"it is compressed ({name}), and images are read from their places: unpack it to a plain tar"
    return None


def _number(field: bytes, at: int) -> int:
    """Octal digits up to a zero byte, or GNU tar's base 256 for what is too large for them."""
    digits = field.partition(b"\0")[0]
    try:
        return int(digits, 8)
    except ValueError:
        if field[0] == 0o200:
            return int.from_bytes(field[1:])
        if digits.strip():
            raise _Damage(_NO_HEADER % at) from None
        return 0


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    if header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return name


def without_dot(name: bytes) -> bytes:
    """`./a.jpg` and `a.jpg` are one file."""
    return name.removeprefix(b"./")


def _shown(name: bytes) -> str:
    return name.decode(errors="replace")


def _pax(content: bytes, at: int) -> dict[bytes, bytes]:
    """The records of a pax header, each `LENGTH KEYWORD=VALUE` and a line's end, where LENGTH counts all of it."""
    records, place = {}, 0
    while match := _PAX_RECORD.match(content, place):
        end = place + int(match[1])
        if end <= match.end() or end > len(content):
            raise _Damage(f"an unsound extended header at byte {at}: copy or pack it again")
        records[match[2]] = content[match.end() : end - 1]
        place = end
    return records


def _override(name: bytes, size: int, records: dict[bytes, bytes], at: int) -> tuple[bytes, int]:
    """A file's name and size as extended headers have them."""
    if any(keyword.startswith(b"GNU.sparse") for keyword in records):
        raise _Damage(_SPARSE_FILE % _shown(name))
    if b"path" in records:
        name = records[b"path"].rstrip(b"/")
    if b"size" in records:
        try:
            size = int(records[b"size"])
        except ValueError:
            raise _Damage(f"an unsound extended header at byte {at}: copy or pack it again") from None
    return name, size
