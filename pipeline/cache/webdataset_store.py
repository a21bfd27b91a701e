"""Views and targets together in plain tars: one a (shard, view), read by the webdataset library without our help.

Each sample is three members: `000000017.jpg` (the view that the teacher saw), `000000017.safetensors` (tokens, scale,
attention) and `000000017.json` (key, box, hflip, source hash, crc32c). The name is the sample's index, because a dot
splits names in webdataset and USTAR refuses long ones. `index/*.index` holds member offsets for random access; it is
ours alone and can be made again from the tar.
"""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from tarfile import BLOCKSIZE, RECORDSIZE, USTAR_FORMAT, TarError, TarInfo
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic_core import from_json

from pipeline.cache.base import TAIL, Raw, Seal, ShardData
from pipeline.cache.files import Descriptor, FileEntry, checksum, file_of, one_line, read_table, sync_folder, write_file
from pipeline.cache.manifest import CacheHeader, canonical
from pipeline.errors import CacheDamage

SUFFIXES = ("jpg", "safetensors", "json")  # members of a sample, in their order
_SAFETENSORS_TYPES = {"int8": "I8", "float16": "F16", "float32": "F32"}
_NONE = -1  # start of a tombstone in the index
# A member's header without its name, size and checksum: mtime 0, uid 0, no owner's name, nothing of the machine.
_BLANK_HEADER = TarInfo("").tobuf(USTAR_FORMAT)
_BLANK_SUM = sum(_BLANK_HEADER) - sum(_BLANK_HEADER[124:135]) - sum(_BLANK_HEADER[148:156]) + 8 * ord(" ")
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

    def open_view(self, shard: int, view: int, fresh: bool = False) -> "TarView":
        tar = Descriptor(file_of(self._root, _tar_name(shard, view)))
        span, index = self._header.shard_range(shard), file_of(self._root, _index_name(shard, view))
        if fresh or not index.is_file():
            rows = index_of(tar, span)
        else:
            rows = np.frombuffer(read_table(index, len(span) * _FIELDS * 8), "<i8").reshape(-1, _FIELDS)
        return TarView(tar, rows, span, self._layout)

    def scan(
        self, shard: int, view: int, rows: list[int], seen: dict[str, FileEntry], fresh: bool = False
    ) -> Iterator[tuple[int, Raw | CacheDamage]]:
        opened = self.open_view(shard, view, fresh)
        hasher = xxhash.xxh3_128()
        yield from opened.records(rows, hasher.update)
        seen[_tar_name(shard, view)] = FileEntry(bytes=opened.tar.size(), xxh3_128=hasher.hexdigest())

    def uncovered(self, shard: int | None, thorough: bool) -> dict[str, str]:
        problems: dict[str, str] = {}
        if shard is None:
            return problems
        for view in range(self._header.views):
            problem = self._index_problem(shard, view, thorough)
            if problem is not None:
                problems[_index_name(shard, view)] = problem
        return problems

    def _index_problem(self, shard: int, view: int, thorough: bool) -> str | None:
        span = self._header.shard_range(shard)
        try:
            stored = read_table(file_of(self._root, _index_name(shard, view)), len(span) * _FIELDS * 8)
        except CacheDamage as error:
            return str(error)
        try:
            tar = Descriptor(file_of(self._root, _tar_name(shard, view)))
            expected = index_of(tar, span).astype("<i8").tobytes() if thorough else stored
        except CacheDamage:
            return None  # the tar itself is damaged, which its own finding says
        return None if stored == expected else "is not the index of its tar"

    def derived(self, shard: int | None) -> list[str]:
        return [] if shard is None else [_index_name(shard, view) for view in range(self._header.views)]

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
        half = np.dtype("<f2")
        self._specs: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            "tokens": (header.quantiser.dtype, (header.tokens, header.dim))
        }
        if header.quantiser.has_scale:
            self._specs["scale"] = (half, (header.tokens,))
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
        self._places = tuple(
            (self._specs[name][1], self._specs[name][0], len(self.head) + self._starts[name])
            if name in self._specs
            else None
            for name in ("tokens", "scale", "attention")
        )

    def write(self, raw: Raw) -> list[Any]:
        """The parts of a record's safetensors file."""
        arrays = {"tokens": raw.tokens, "scale": raw.scale, "attention": raw.attention}
        return [self.head, *(np.ascontiguousarray(arrays[name]) for name in self._starts)]

    def tensors(self, record: NDArray[np.uint8], start: int) -> tuple[Any, Any, Any]:
        """Tokens, scale and attention as views of the safetensors file that lies at `start` of a record [bytes]."""
        tokens, scale, attention = self._places
        assert tokens is not None
        return (  # the constructor is three times faster than slicing, viewing and reshaping
            np.ndarray(tokens[0], tokens[1], record, start + tokens[2]),
            None if scale is None else np.ndarray(scale[0], scale[1], record, start + scale[2]),
            None if attention is None else np.ndarray(attention[0], attention[1], record, start + attention[2]),
        )


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
            yield member_header(f"{index:09d}.{suffix}", size)
            yield from parts
            yield bytes(-size % BLOCKSIZE)
            offset += BLOCKSIZE + _padded(size)
    yield bytes(_trailer(offset))


def _trailer(offset: int) -> int:
    """Zero bytes at the end of a tar: two blocks, then as many as fill a record, as tar itself writes."""
    return 2 * BLOCKSIZE + -(offset + 2 * BLOCKSIZE) % RECORDSIZE


def _padded(size: int) -> int:
    return size + -size % BLOCKSIZE


def member_header(name: str, size: int) -> bytes:
    """A member's USTAR header, as tarfile writes it and ten times faster; an ASCII name, a size under 8 GiB."""
    header, named, sized = bytearray(_BLANK_HEADER), name.encode("ascii"), b"%011o" % size
    header[: len(named)], header[124:135] = named, sized
    header[148:154] = b"%06o" % (_BLANK_SUM + sum(named) + sum(sized))
    return bytes(header)


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
    except (TarError, ValueError) as error:
        raise CacheDamage(f"{path.name}: no tar header at byte {offset}") from error
    if info.size < 0:
        raise CacheDamage(f"{path.name}: a member of negative size at byte {offset}")
    return info.name, info.size


class TarView:
    """One tar with its index, open for reading."""

    def __init__(self, tar: Descriptor, rows: NDArray[np.int64], span: range, layout: TensorLayout) -> None:
        self.tar, self._rows, self._span, self._layout = tar, rows, span, layout
        self._fields = memoryview(rows.astype(np.int64).tobytes()).cast("q")  # faster to index than an array

    def read(self, row: int) -> Raw:
        start, jpg, tensors, facts = self._row(row)
        record = np.empty(3 * BLOCKSIZE + _padded(jpg) + _padded(tensors) + facts, np.uint8)
        self.tar.read_into(record, start)
        return self._parse(row, record, jpg, tensors, facts)

    def _parse(self, row: int, record: NDArray[np.uint8], jpg: int, tensors: int, facts: int) -> Raw:
        """Take a record [bytes], from its first member's header on, apart. Tokens, scale, attention are views of it."""
        layout, start = self._layout, 2 * BLOCKSIZE + _padded(jpg)
        if tensors != layout.bytes or record[start : start + len(layout.head)].tobytes() != layout.head:
            raise CacheDamage(f"{self.tar.path.name}: the safetensors header of {self._span[row]:09d} differs")
        facts_start = start + _padded(tensors) + BLOCKSIZE
        key, tail, crc32c = self._parse_facts(row, record[facts_start : facts_start + facts].tobytes())
        image = record[BLOCKSIZE : BLOCKSIZE + jpg].tobytes()
        return Raw(key, tail, crc32c, *layout.tensors(record, start), image)

    def key(self, row: int) -> str:
        start, jpg, tensors, facts = self._row(row)
        content = np.empty(facts, np.uint8)
        self.tar.read_into(content, start + 3 * BLOCKSIZE + _padded(jpg) + _padded(tensors))
        return self._parse_facts(row, content.tobytes())[0].decode()

    def records(self, rows: list[int], measure: Callable[[Any], None]) -> Iterator[tuple[int, Raw | CacheDamage]]:
        """Give every byte of the tar to `measure` in order; yields (row, record) of `rows`, overwritten by the next."""
        buffer, offset = np.empty(0, np.uint8), 0
        for row in rows:
            try:
                start, jpg, tensors, facts = self._row(row)
                if start != offset:
                    raise CacheDamage(f"the index of {self.tar.path.name} places {self._span[row]:09d} at byte {start}")
                size = 3 * BLOCKSIZE + _padded(jpg) + _padded(tensors) + _padded(facts)
                offset += size
                if len(buffer) < size:
                    buffer = np.empty(size, np.uint8)
                record = buffer[:size]
                self.tar.read_into(record, start)
                measure(record)
                raw = self._parse(row, record, jpg, tensors, facts)
            except CacheDamage as error:
                yield row, error
            else:
                yield row, raw._replace(scale=_kept(raw.scale), attention=_kept(raw.attention))
        measure(self.tar.read_from(offset))

    def _row(self, row: int) -> tuple[int, int, int, int]:
        start, jpg, tensors, facts = self._fields[_FIELDS * row : _FIELDS * (row + 1)]
        if start < 0:
            raise CacheDamage(f"{self.tar.path.name} does not hold {self._span[row]:09d}")
        return start, jpg, tensors, facts

    def _parse_facts(self, row: int, content: bytes) -> tuple[bytes, bytes, int]:
        try:
            facts = from_json(content)  # four times faster than json
            tail = TAIL.pack(*facts["box"], facts["hflip"], facts["source_hash"])
            return facts["key"].encode(), tail, int(facts["crc32c"])
        except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
            raise CacheDamage(f"{self.tar.path.name}: {self._span[row]:09d}.json is not what was written") from error


def _kept(values: NDArray[np.float16] | None) -> NDArray[np.float16] | None:
    return None if values is None else values.copy()
