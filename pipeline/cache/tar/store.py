"""Views and targets together in plain tars: one a (shard, view), read by the webdataset library without our help.

Each sample is three members: `000000017.jpg` (the view that the teacher saw), `000000017.safetensors` (tokens, scale,
attention) and `000000017.json` (key, box, hflip, source hash, crc32c). The name is the sample's index, because a dot
splits names in webdataset and USTAR refuses long ones. `index/*.index` holds member offsets for random access; it is
ours alone and can be made again from the tar.
"""

from collections.abc import Iterator
from pathlib import Path
from tarfile import BLOCKSIZE, USTAR_FORMAT, TarInfo
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.files import Descriptor, FileEntry, checksum, file_of, one_line, read_table, write_file
from pipeline.cache.format.header import CacheHeader, canonical
from pipeline.cache.format.records import TAIL, LocalFiles, Raw, Seal, ShardData, ShardFiles
from pipeline.cache.tar.view import (
    FIELDS,
    NONE,
    SUFFIXES,
    TarView,
    TensorLayout,
    ThreadBuffer,
    index_of,
    padded,
    trailer,
    within,
)
from pipeline.errors import CacheDamage
from pipeline.files import remove_dead_partials, sync

# A member's header without its name, size and checksum: mtime 0, uid 0, no owner's name, nothing of the machine.
_BLANK_HEADER = TarInfo("").tobuf(USTAR_FORMAT)
_BLANK_SUM = sum(_BLANK_HEADER) - sum(_BLANK_HEADER[124:135]) - sum(_BLANK_HEADER[148:156]) + 8 * ord(" ")


class WebdatasetStore:
    """See `pipeline.cache.format.records.Store`."""

    stores_images = True
    entries = frozenset({"shards", "index"})
    descriptors = 1

    def __init__(self, root: Path, header: CacheHeader, files: ShardFiles | None = None) -> None:
        self._root, self._header, self._shard_files = root, header, files or LocalFiles(root)
        self._layout, self._buffer = TensorLayout(header), ThreadBuffer(TensorLayout(header))

    def create(self) -> None:
        for name in self.entries:
            (self._root / name).mkdir(parents=True, exist_ok=True)

    def files(self, shard: int) -> list[str]:
        return [tar_name(shard, view) for view in range(self._header.views)]

    def tables(self, shard: int) -> list[str]:
        return self.derived(shard)

    def record_files(self, shard: int) -> list[str]:
        return self.files(shard)

    def write(self, shard: int, data: ShardData, seal: Seal) -> dict[str, FileEntry]:
        span, written = self._header.shard_range(shard), {}
        for view in range(self._header.views):
            rows = np.full((len(span), FIELDS), NONE, np.int64)
            tar = _tar(span, data, view, seal, self._layout, rows)
            written[tar_name(shard, view)] = write_file(file_of(self._root, tar_name(shard, view)), tar)
            self._write_index(shard, view, rows)
        sync(self._root / "shards")
        sync(self._root / "index")
        return written

    def _write_index(self, shard: int, view: int, rows: NDArray[np.int64]) -> None:
        payload = rows.astype("<i8").tobytes()
        write_file(file_of(self._root, index_name(shard, view)), [payload, checksum(payload)])

    def table(self, shard: int, view: int | None, fresh: bool = False) -> bytes:
        if view is None:
            return b""
        size = self._shard_files.size_of(shard, tar_name(shard, view))
        span, index = self._header.shard_range(shard), file_of(self._root, index_name(shard, view))
        if fresh or not index.is_file():
            rows = index_of(Descriptor(file_of(self._root, tar_name(shard, view))), span)
        else:
            rows = np.frombuffer(read_table(index, len(span) * FIELDS * 8), "<i8").reshape(-1, FIELDS)
        return within(rows, size).tobytes()

    def open_view(self, shard: int, view: int, shared: Any, table: Any) -> TarView:
        tar = self._shard_files.open_file(shard, tar_name(shard, view))
        return TarView(tar, table, self._header.shard_range(shard), self._layout, self._buffer)

    def uncovered(self, shard: int | None, thorough: bool) -> dict[str, str]:
        problems: dict[str, str] = {}
        if shard is None:
            return problems
        for view in range(self._header.views):
            problem = self._index_problem(shard, view, thorough)
            if problem is not None:
                problems[index_name(shard, view)] = problem
        return problems

    def _index_problem(self, shard: int, view: int, thorough: bool) -> str | None:
        span = self._header.shard_range(shard)
        try:
            stored = read_table(file_of(self._root, index_name(shard, view)), len(span) * FIELDS * 8)
        except CacheDamage as error:
            return str(error)
        try:
            tar = Descriptor(file_of(self._root, tar_name(shard, view)))
            expected = index_of(tar, span).astype("<i8").tobytes() if thorough else stored
        except CacheDamage:
            return None  # the tar itself is damaged, which its own finding says
        return None if stored == expected else "is not the index of its tar"

    def derived(self, shard: int | None) -> list[str]:
        return [] if shard is None else [index_name(shard, view) for view in range(self._header.views)]

    def rebuild(self, file: str) -> None:
        shard, view = (int(part) for part in file.removeprefix("index/").removesuffix(".index").split("-"))
        with one_line(f"{file_of(self._root, file)}: can't be written"):
            tar = Descriptor(file_of(self._root, tar_name(shard, view)))
            remove_dead_partials(file_of(self._root, file))
            self._write_index(shard, view, index_of(tar, self._header.shard_range(shard)))
            sync(self._root / "index")


def tar_name(shard: int, view: int) -> str:
    return f"shards/{shard:06d}-{view:02d}.tar"


def index_name(shard: int, view: int) -> str:
    return f"index/{shard:06d}-{view:02d}.index"


def _tar(
    span: range, data: ShardData, view: int, seal: Seal, layout: TensorLayout, rows: NDArray[np.int64]
) -> Iterator[Any]:
    """The parts of one view's tar, in order; fills `rows` [n, 4], the index, on the way."""
    offset = 0
    for row, index in enumerate(span):
        if index in data.tombstones:
            continue
        raw = data.record(row, view)
        assert raw.image is not None
        members = ([raw.image], layout.write(raw), [facts_of(raw, seal(index, view, raw))])
        rows[row] = [offset, len(raw.image), layout.bytes, len(members[2][0])]
        for suffix, parts, size in zip(SUFFIXES, members, rows[row, 1:].tolist(), strict=True):
            yield member_header(f"{index:09d}.{suffix}", size)
            yield from parts
            yield bytes(-size % BLOCKSIZE)
            offset += BLOCKSIZE + padded(size)
    yield bytes(trailer(offset))


def member_header(name: str, size: int) -> bytes:
    """A member's USTAR header, as tarfile writes it and ten times faster; an ASCII name, a size under 8 GiB."""
    header, named, sized = bytearray(_BLANK_HEADER), name.encode("ascii"), b"%011o" % size
    header[: len(named)], header[124:135] = named, sized
    header[148:154] = b"%06o" % (_BLANK_SUM + sum(named) + sum(sized))
    return bytes(header)


def facts_of(raw: Raw, crc32c: int) -> bytes:
    *box, hflip, source_hash = TAIL.unpack(raw.tail)
    facts = {"key": raw.key.decode(), "box": box, "hflip": hflip, "source_hash": source_hash, "crc32c": crc32c}
    return canonical(facts)
