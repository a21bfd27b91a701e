"""Views and targets together in plain tars: one a (shard, view), read by the webdataset library without our help.

Each sample is three members: `000000017.jpg` (the view that the teacher saw), `000000017.safetensors` (tokens, scale,
attention) and `000000017.json` (key, box, hflip, source hash, crc32c). The name is the sample's index, because a dot
splits names in webdataset and USTAR refuses long ones. `index/*.index` holds member offsets for random access; it is
ours alone and can be made again from the tar.
"""

import json
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from tarfile import BLOCKSIZE, RECORDSIZE, USTAR_FORMAT, TarInfo
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.cache.base import TAIL, Raw, Seal, ShardData, file_of
from pipeline.cache.files import Descriptor, FileEntry, checksum, one_line, read_table, sync_folder, write_file
from pipeline.cache.manifest import CacheHeader, canonical
from pipeline.errors import CacheDamage

SUFFIXES = ("jpg", "safetensors", "json")  # members of a sample, in their order
_SAFETENSORS_TYPES = {"int8": "I8", "float16": "F16", "float32": "F32"}
_NONE = -1  # start of a tombstone in the index
_FIELDS = 4  # of an index row: start of the first member's header, then the byte length of each member


class WebdatasetStore:
    """See `pipeline.cache.base.Store`."""

    stores_images = True
    descriptors = 1

    def __init__(self, root: Path, header: CacheHeader) -> None:
        self._root, self._header = root, header
        self._layout = TensorLayout(header)

    def create(self) -> None:
        for name in ("shards", "index"):
            (self._root / name).mkdir(parents=True, exist_ok=True)

    def files(self, shard: int) -> list[str]:
        return [_tar_name(shard, view) for view in range(self._header.views)]

    def write(self, shard: int, data: ShardData, seal: Seal) -> dict[str, FileEntry]:
        span, written = self._header.shard_range(shard), {}
        for view in range(self._header.views):
            rows = np.full((len(span), _FIELDS), _NONE, np.int64)
            tar = _tar(span, data, view, seal, self._layout, rows)
            written[_tar_name(shard, view)] = write_file(file_of(self._root, _tar_name(shard, view)), tar)
            self._write_index(shard, view, rows)
        sync_folder(self._root / "shards")
        sync_folder(self._root / "index")
        return written

    def _write_index(self, shard: int, view: int, rows: NDArray[np.int64]) -> None:
        payload = rows.astype("<i8").tobytes()
        write_file(file_of(self._root, _index_name(shard, view)), [payload, checksum(payload)])

    def open_view(self, shard: int, view: int) -> "TarView":
        tar = Descriptor(file_of(self._root, _tar_name(shard, view)))
        span, index = self._header.shard_range(shard), file_of(self._root, _index_name(shard, view))
        if index.is_file():
            rows = np.frombuffer(read_table(index, len(span) * _FIELDS * 8), "<i8").reshape(-1, _FIELDS)
        else:
            rows = index_of(tar, span)
        return TarView(tar, rows, span, self._layout)

    def scan(self, shard: int, view: int, rows: list[int], seen: dict[str, FileEntry]) -> Iterator[tuple[int, Raw]]:
        opened = self.open_view(shard, view)
        hasher = xxhash.xxh3_128()
        for row, record in opened.records(rows, hasher.update):
            yield row, opened.parse(row, record)
        seen[_tar_name(shard, view)] = FileEntry(bytes=opened.tar.size(), xxh3_128=hasher.hexdigest())

    def uncovered(self) -> Iterator[tuple[int | None, str, str | None]]:
        for shard in range(self._header.shards):
            for view in range(self._header.views):
                tar = file_of(self._root, _tar_name(shard, view))
                if tar.is_file():
                    yield shard, _index_name(shard, view), self._index_problem(shard, view, tar)

    def _index_problem(self, shard: int, view: int, tar: Path) -> str | None:
        index, span = file_of(self._root, _index_name(shard, view)), self._header.shard_range(shard)
        try:
            stored = read_table(index, len(span) * _FIELDS * 8)
            expected = index_of(Descriptor(tar), span).astype("<i8").tobytes()
        except CacheDamage as error:
            return str(error)
        return None if stored == expected else "is not the index of its tar"

    def rebuild(self, file: str) -> None:
        shard, view = (int(part) for part in file.removeprefix("index/").removesuffix(".index").split("-"))
        with one_line(f"{file_of(self._root, file)}: can't be written"):
            tar = Descriptor(file_of(self._root, _tar_name(shard, view)))
            self._write_index(shard, view, index_of(tar, self._header.shard_range(shard)))
            sync_folder(self._root / "index")


class TensorLayout:
    """Where the tensors of one record lie in its safetensors file: the same for every record of a cache.

    Larger items come first, so that every tensor is aligned; there are no metadata entries.
    """

    def __init__(self, header: CacheHeader) -> None:
        self.tokens = (header.quantiser.dtype, (header.tokens, header.dim))
        self.scale = (np.dtype("<f2"), (header.tokens,)) if header.quantiser.has_scale else None
        shape = header.attention_shape
        self.attention = None if shape is None else (np.dtype("<f2"), shape)
        named = {"tokens": self.tokens, "scale": self.scale, "attention": self.attention}
        present = [(name, spec) for name, spec in named.items() if spec is not None]
        entries, self.slices, offset = {}, {}, 0
        for name, (dtype, tensor) in sorted(present, key=lambda item: -item[1][0].itemsize):
            end = offset + int(np.prod(tensor)) * dtype.itemsize
            entries[name] = {
                "dtype": _SAFETENSORS_TYPES[dtype.name],
                "shape": list(tensor),
                "data_offsets": [offset, end],
            }
            self.slices[name] = (offset, end)
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.head = struct.pack("<Q", len(text)) + text
        self.bytes = len(self.head) + offset

    def write(self, raw: Raw) -> list[Any]:
        """The parts of a record's safetensors file."""
        tensors = {"tokens": raw.tokens, "scale": raw.scale, "attention": raw.attention}
        return [self.head, *(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8) for name in self.slices)]

    def tensor(
        self, name: str, spec: tuple[np.dtype[Any], tuple[int, ...]], content: NDArray[np.uint8]
    ) -> NDArray[Any]:
        """One tensor of a safetensors file [bytes] as a view of it."""
        start, end = self.slices[name]
        return content[len(self.head) + start : len(self.head) + end].view(spec[0]).reshape(spec[1])


def _tar_name(shard: int, view: int) -> str:
    return f"shards/{shard:06d}-{view:02d}.tar"


def _index_name(shard: int, view: int) -> str:
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
        members = ([raw.image], layout.write(raw), [_facts(raw, seal(index, view, raw))])
        rows[row] = [offset, len(raw.image), layout.bytes, len(members[2][0])]
        for suffix, parts, size in zip(SUFFIXES, members, rows[row, 1:].tolist(), strict=True):
            yield _member_header(f"{index:09d}.{suffix}", size)
            yield from parts
            yield bytes(-size % BLOCKSIZE)
            offset += BLOCKSIZE + _padded(size)
    yield bytes(_trailer(offset))


def _trailer(offset: int) -> int:
    """Zero bytes at the end of a tar: two blocks, then as many as fill a record, as tar itself writes."""
    return 2 * BLOCKSIZE + -(offset + 2 * BLOCKSIZE) % RECORDSIZE


def _padded(size: int) -> int:
    return size + -size % BLOCKSIZE


def _member_header(name: str, size: int) -> bytes:
    info = TarInfo(name)  # mtime 0, uid 0, no owner's name: the bytes depend on nothing but the content
    info.size, info.mode = size, 0o644
    return info.tobuf(USTAR_FORMAT)


def _facts(raw: Raw, crc32c: int) -> bytes:
    *box, hflip, source_hash = TAIL.unpack(raw.tail)
    facts = {"key": raw.key.decode(), "box": box, "hflip": hflip, "source_hash": source_hash, "crc32c": crc32c}
    return canonical(facts)


def index_of(tar: Descriptor, span: range) -> NDArray[np.int64]:
    """Make the index [n, 4] of a tar again by walking its headers.

    Raises:
        CacheDamage: something else than the samples of `span` in their order, three members each.
    """
    rows = np.full((len(span), _FIELDS), _NONE, np.int64)
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
            offset += BLOCKSIZE + _padded(size)
        row = int(names[0][:9]) - span.start if names[0][:9].isdecimal() else _NONE
        if not 0 <= row < len(span) or names != [f"{span[row]:09d}.{suffix}" for suffix in SUFFIXES]:
            raise CacheDamage(f"{tar.path.name}: unexpected members {', '.join(names)} at byte {start}")
        rows[row] = [start, *sizes]
    if end != offset + _trailer(offset):
        raise CacheDamage(f"{tar.path.name} ends at byte {end} instead of {offset + _trailer(offset)}")
    return rows


def _parse_header(path: Path, header: bytes, offset: int) -> tuple[str, int]:
    try:
        info = TarInfo.frombuf(header, "ascii", "strict")
    except (ValueError, OSError) as error:  # tarfile's errors are OSErrors
        raise CacheDamage(f"{path.name}: no tar header at byte {offset}") from error
    return info.name, info.size


class TarView:
    """One tar with its index, open for reading."""

    def __init__(self, tar: Descriptor, rows: NDArray[np.int64], span: range, layout: TensorLayout) -> None:
        self.tar, self._rows, self._span, self._layout = tar, rows, span, layout

    def read(self, row: int) -> Raw:
        start, jpg, tensors, facts = self._row(row)
        record = np.empty(3 * BLOCKSIZE + _padded(jpg) + _padded(tensors) + facts, np.uint8)
        self.tar.read_into(record, start)
        return self.parse(row, record)

    def parse(self, row: int, record: NDArray[np.uint8]) -> Raw:
        """Take a record [bytes], from its first member's header on, apart. Tokens, scale, attention are views of it."""
        _, jpg, tensors, facts = self._row(row)
        layout = self._layout
        start = 2 * BLOCKSIZE + _padded(jpg)
        content = record[start : start + tensors]
        if tensors != layout.bytes or content[: len(layout.head)].tobytes() != layout.head:
            raise CacheDamage(f"{self.tar.path.name}: the safetensors header of {self._span[row]:09d} differs")
        start += _padded(tensors) + BLOCKSIZE
        key, tail, crc32c = self._parse_facts(row, record[start : start + facts].tobytes())
        return Raw(
            key,
            tail,
            crc32c,
            layout.tensor("tokens", layout.tokens, content),
            None if layout.scale is None else layout.tensor("scale", layout.scale, content),
            None if layout.attention is None else layout.tensor("attention", layout.attention, content),
            record[BLOCKSIZE : BLOCKSIZE + jpg].tobytes(),
        )

    def key(self, row: int) -> str:
        start, jpg, tensors, facts = self._row(row)
        content = np.empty(facts, np.uint8)
        self.tar.read_into(content, start + 3 * BLOCKSIZE + _padded(jpg) + _padded(tensors))
        return self._parse_facts(row, content.tobytes())[0].decode()

    def records(self, rows: list[int], measure: Callable[[Any], None]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Give every byte of the tar to `measure` in order; yields (row, record) of `rows`, overwritten by the next."""
        starts = self._rows[self._rows[:, 0] >= 0, 0].tolist()
        present = np.flatnonzero(self._rows[:, 0] >= 0).tolist()
        if present != rows:
            raise CacheDamage(f"{self.tar.path.name} holds {len(present)} samples instead of {len(rows)}")
        last = self._row(present[-1]) if present else (0, 0, 0, 0)
        end = last[0] + sum(BLOCKSIZE + _padded(size) for size in last[1:]) if present else 0
        buffer = np.empty(0, np.uint8)
        for row, (start, stop) in zip(present, pairwise([*starts, end]), strict=True):
            if len(buffer) < stop - start:
                buffer = np.empty(stop - start, np.uint8)
            record = buffer[: stop - start]
            self.tar.read_into(record, start)
            measure(record)
            yield row, record
        measure(self.tar.read_from(end))

    def _row(self, row: int) -> list[int]:
        fields: list[int] = self._rows[row].tolist()
        if min(fields) < 0:
            raise CacheDamage(f"{self.tar.path.name} does not hold {self._span[row]:09d}")
        return fields

    def _parse_facts(self, row: int, content: bytes) -> tuple[bytes, bytes, int]:
        try:
            facts = json.loads(content)
            tail = TAIL.pack(*facts["box"], facts["hflip"], facts["source_hash"])
            return facts["key"].encode(), tail, int(facts["crc32c"])
        except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
            raise CacheDamage(f"{self.tar.path.name}: {self._span[row]:09d}.json is not what was written") from error
