"""Verifying one view of one shard of the zarr store: every byte hashed, every record's checksum, in one pass.

A block of tokens is read once and walked twice, by the file's hash and by its records' checksums, while the CPU's cache
holds it and a second thread reads the next. The chunks' own checksums are left aside: the file's hash covers more.
"""

from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from awscrt.checksums import crc32c
from numpy.typing import NDArray

from pipeline.cache.check.walk import RUN
from pipeline.cache.files import Descriptor, FileEntry, aligned, cut_table, file_of, read_whole
from pipeline.cache.format.header import CacheHeader
from pipeline.cache.format.records import TAIL, Scan, Walk
from pipeline.cache.zarr.view import (
    Layout,
    array_specs,
    chunk_file,
    packed_index,
    parse_strings,
    read_packed,
    table_sizes,
    tails_of,
)
from pipeline.errors import CacheDamage


def scan_chunks(root: Path, header: CacheHeader, shard: int, view: int, rows: list[int], walk: Walk) -> Scan:
    """See `pipeline.cache.format.records.Store.scan`."""
    chunks = _Chunks(root, header, shard, view, walk.seen)
    tokens = _Tokens(chunks, rows, header.shard_range(shard), walk)
    name = chunk_file("tokens", shard, view, 4)
    file = Descriptor(file_of(root, name))
    if header.compression is not None:
        tokens.check_packed(file, packed_index(file, header.samples_per_shard))
    elif (measure := tokens.check_file(file)) is not None:
        walk.seen[name] = measure
    sound = [row for row in rows if row not in tokens.damaged]
    at = np.array(sound, np.intp)
    return Scan(
        rows=sound,
        keys=[chunks.keys[row] for row in sound],
        tails=chunks.tails[at],
        scale=chunks.halves["scale"][at] if "scale" in chunks.halves else None,
        attention=chunks.halves["attention"][at] if "attention" in chunks.halves else None,
        infinite=tokens.infinite,
        damaged=tokens.damaged,
    )


_DIFFERS = "its checksum differs"


class _Chunks:
    """Every chunk of one shard and view but that of tokens, measured and taken apart."""

    def __init__(self, root: Path, header: CacheHeader, shard: int, view: int, seen: dict[str, FileEntry]) -> None:
        self.header, self.view, self.layout = header, view, Layout(header)
        self._loaded, S = dict[str, tuple[str, bytes]](), header.samples_per_shard
        for name, (shape, _, _) in array_specs(header).items():
            if name != "tokens":
                file = chunk_file(name, shard, view, len(shape))
                content = read_whole(file_of(root, file))
                self._loaded[name] = file, content
                seen[file] = FileEntry(bytes=len(content), xxh3_128=xxhash.xxh3_128_hexdigest(content))
        tables = {name: self._cut(name, size) for name, size in table_sizes(S).items()}
        self.tails, self.crc32c = tails_of(tables), np.frombuffer(tables["crc32c"], "<u4").tolist()
        self.keys = parse_strings(self._cut("key"), S, self._loaded["key"][0])
        self.halves = {name: self._half(name, S) for name in self.layout.names[1:]}

    def _cut(self, name: str, size: int | None = None) -> bytes:
        return cut_table(*self._loaded[name], size)

    def _half(self, name: str, rows: int) -> NDArray[Any]:
        shape, dtype, start, stop = self.layout.places[name]
        return np.frombuffer(self._cut(name, rows * (stop - start)), dtype).reshape(rows, *shape)


class _Tokens:
    """The checksums of one view's records, as far as they go without the tokens, and what became of the records."""

    def __init__(self, chunks: _Chunks, rows: list[int], span: range, walk: Walk) -> None:
        self.damaged, self.infinite = dict[int, str](), list[int]()
        self._rows, self._wanted, self._stated = rows, frozenset(rows), chunks.crc32c
        self._dtype, self._shape = chunks.header.quantiser.dtype, (chunks.header.tokens, chunks.header.dim)
        self._size, self._floats = chunks.layout.places["tokens"][3], self._dtype.kind == "f"
        tails, keys, step = chunks.tails.tobytes(), chunks.keys, TAIL.size
        self._heads = [
            walk.seal.head(index, chunks.view, keys[row], tails[row * step : (row + 1) * step])
            for row, index in enumerate(span)
        ]
        halves = [half.reshape(len(half), -1).view(np.uint8) for half in chunks.halves.values()]
        self._rest: list[Any] = list(np.concatenate(halves, 1)) if halves else [b""] * len(keys)
        self._count, self._walker = len(keys), walk.walker

    def _check(self, row: int, tokens: Any) -> None:
        """A record's checksum: before, of, and behind its tokens (bytes)."""
        if crc32c(self._rest[row], crc32c(tokens, self._heads[row])) != self._stated[row]:
            self.damaged[row] = _DIFFERS
        elif self._floats:
            self._look_at(row, [row], tokens)

    def _look_at(self, first: int, rows: list[int], block: NDArray[np.uint8]) -> None:
        """Float tokens of sound rows must be finite; `block` [bytes] begins with row `first`."""
        for row in rows:
            tokens = block[(row - first) * self._size :][: self._size].view(self._dtype)
            if row not in self.damaged and not np.isfinite(tokens).all():
                self.infinite.append(row)

    def check_file(self, file: Descriptor) -> FileEntry | None:
        """Check every record and measure the file; None when it can't be read whole."""
        size, count, wanted = self._size, self._count, self._wanted
        heads, rest, stated = self._heads, self._rest, self._stated
        step = -(-RUN // size)
        runs = [range(start, min(start + step, count)) for start in range(0, count, step)]
        for run, block in zip(runs, self._walker.blocks(file, [len(run) * size for run in runs]), strict=True):
            if isinstance(block, CacheDamage):
                self._check_apart(file, [row for row in run if row in wanted])
                continue
            content = block.data  # slices of it cost half as much as an array's
            parts = [content[at : at + size] for at in range(0, len(content), size)]
            rows = slice(run.start, min(run.stop, len(heads)))  # behind them lies what fills the last chunk up
            crcs = list(map(crc32c, rest[rows], map(crc32c, parts, heads[rows])))
            if crcs != stated[rows]:
                different = {row for row, crc, right in zip(run, crcs, stated[rows], strict=False) if crc != right}
                self.damaged.update(dict.fromkeys(sorted(different & wanted), _DIFFERS))
            if self._floats:
                self._look_at(run.start, [row for row in run if row in wanted], block)
        return self._walker.measure  # there, since `strict` asks for one block more

    def _check_apart(self, file: Descriptor, rows: list[int]) -> None:
        """Rows of a block that can't be read whole, one by one."""
        part = aligned(self._size)
        for row in rows:
            try:
                file.read_into(part, row * self._size)
            except CacheDamage as error:
                self.damaged[row] = str(error)
            else:
                self._check(row, part)

    def check_packed(self, file: Descriptor, index: NDArray[np.uint64]) -> None:
        """Check every record of a compressed chunk, whose `index` says where they lie."""
        part = aligned(self._size)
        tokens = part.view(self._dtype).reshape(self._shape)
        for row in self._rows:
            try:
                read_packed(file, row, index[row].tolist(), tokens)
            except CacheDamage as error:
                self.damaged[row] = str(error)
            else:
                self._check(row, part)
