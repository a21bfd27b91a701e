"""Reading the zarr store's chunk files raw: a chunk is the plain array and its crc32c, so a record is one `pread`."""

from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
from numpy.typing import NDArray

from pipeline.cache.base import TAIL, Raw
from pipeline.cache.files import CHECKSUM_BYTES, Descriptor, check_table, cut_table, file_of, read_table
from pipeline.cache.manifest import CacheHeader
from pipeline.errors import CacheDamage

_TAILS: np.dtype[Any] = np.dtype(
    [("box", "<i4", 4), ("hflip", "u1"), ("source_hash", "<u8")]
)  # rows of the struct TAIL


def array_specs(header: CacheHeader) -> dict[str, tuple[tuple[int, ...], str, tuple[str, ...]]]:
    """Arrays of the group: name → (shape, dtype, dimension names). Those of 2 dimensions or more run over views."""
    N, V, L, D = header.count, header.views, header.tokens, header.dim
    specs: dict[str, tuple[tuple[int, ...], str, tuple[str, ...]]] = {
        "tokens": ((N, V, L, D), header.quantiser.dtype.name, ("sample", "view", "token", "channel")),
        "box": ((N, V, 4), "int32", ("sample", "view", "edge")),
        "hflip": ((N, V), "uint8", ("sample", "view")),
        "crc32c": ((N, V), "uint32", ("sample", "view")),
        "source_hash": ((N,), "uint64", ("sample",)),
        "key": ((N,), "str", ("sample",)),
    }
    if header.quantiser.has_scale:
        specs["scale"] = ((N, V, L), "float16", ("sample", "view", "token"))
    if header.attention_shape is not None:
        names = ("sample", "view", "head", "token") if header.attention == "heads" else ("sample", "view", "token")
        specs["attention"] = ((N, V, *header.attention_shape), "float16", names)
    return specs


def chunk_file(name: str, shard: int, view: int, dimensions: int) -> str:
    """The chunk of one shard and view; arrays of one dimension have no views."""
    where = [shard, *((view,) if dimensions > 1 else ()), *(0 for _ in range(dimensions - 2))]
    return f"{name}/c." + ".".join(map(str, where))


class ZarrView:
    """One view of one shard: the large arrays as open files, the small ones in memory (about 100 bytes a sample).

    `loaded` gives the whole content of the small files and of `scale` and `attention`, for a scan that has read them;
    their own checksums aren't looked at then.
    """

    def __init__(
        self, root: Path, header: CacheHeader, shard: int, view: int, loaded: dict[str, bytes] | None = None
    ) -> None:
        specs, S = array_specs(header), header.samples_per_shard

        def path(name: str) -> Path:
            return file_of(root, chunk_file(name, shard, view, len(specs[name][0])))

        def content(name: str, size: int | None = None) -> bytes:
            return read_table(path(name), size) if loaded is None else cut_table(path(name), loaded[name], size)

        def table(name: str, dtype: str, *shape: int) -> NDArray[Any]:
            size = S * int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize
            return np.frombuffer(content(name, size), dtype).reshape(S, *shape)

        def rows(name: str, shape: tuple[int, ...] | None) -> "_FileRows | NDArray[Any] | None":
            if name not in specs or shape is None:
                return None
            return _FileRows(path(name), np.dtype("<f2"), shape) if loaded is None else table(name, "<f2", *shape)

        tokens, dtype, shape = path("tokens"), header.quantiser.dtype, (header.tokens, header.dim)
        packed = header.compression is not None
        self._tokens = _PackedRows(tokens, dtype, shape, S) if packed else _FileRows(tokens, dtype, shape)
        self._scale = rows("scale", (header.tokens,))
        self._attention = rows("attention", header.attention_shape)
        tails = np.empty(S, _TAILS)
        tails["box"] = table("box", "<i4", 4)
        tails["hflip"] = table("hflip", "u1")
        tails["source_hash"] = table("source_hash", "<u8")
        self._tails = tails.tobytes()
        self._crc = memoryview(table("crc32c", "<u4").astype(np.uint32).tobytes()).cast("I")
        self._keys = _parse_strings(content("key"), S, path("key").name)

    def read(self, row: int, tokens: NDArray[Any] | None = None) -> Raw:
        """One record; `tokens` if the caller has read them already."""
        return Raw(
            self._keys[row],
            self._tails[row * TAIL.size : (row + 1) * TAIL.size],
            self._crc[row],
            self._tokens[row] if tokens is None else tokens,
            None if self._scale is None else self._scale[row],
            None if self._attention is None else self._attention[row],
            None,
        )

    def key(self, row: int) -> str:
        return self._keys[row].decode()

    @property
    def file_rows(self) -> "_FileRows":
        """The tokens file, uncompressed."""
        assert isinstance(self._tokens, _FileRows)
        return self._tokens


class _FileRows:
    """A chunk file as it is, indexed by row without being loaded: the array, then its crc32c."""

    def __init__(self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.file, self._dtype, self._shape = Descriptor(path), dtype, shape
        self.bytes = int(np.prod(shape)) * dtype.itemsize  # of one row
        self._block = np.empty((0, *shape), dtype)

    def __getitem__(self, row: int) -> NDArray[Any]:
        values = np.empty(self._shape, self._dtype)
        self.file.read_into(values, row * self.bytes)
        return values

    def block(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start to stop, [n, ...]; the next block overwrites them."""
        if len(self._block) < stop - start:
            self._block = np.empty((stop - start, *self._shape), self._dtype)
        block = self._block[: stop - start]
        self.file.read_into(block, start * self.bytes)
        return block


class _PackedRows:
    """Tokens in zarr's sharding codec: inner chunks, one a record, then an index of (offset, length) and its crc32c."""

    def __init__(self, path: Path, dtype: np.dtype[Any], shape: tuple[int, int], rows: int) -> None:
        self._file, self._dtype, self._shape = Descriptor(path), dtype, shape
        self._end = self._file.size() - rows * 16 - CHECKSUM_BYTES
        if self._end < 0:
            raise CacheDamage(f"{path.name} is shorter than its index")
        index = check_table(path, self._file.read_from(self._end))
        self._index = np.frombuffer(index, "<u8").reshape(rows, 2)
        self._codec = numcodecs.Blosc()

    def __getitem__(self, row: int) -> NDArray[Any]:
        offset, length = self._index[row].tolist()
        if not 0 < length <= self._end - offset:
            raise CacheDamage(f"{self._file.path.name}: row {row} lies outside the file")
        packed = np.empty(length, np.uint8)
        self._file.read_into(packed, offset)
        tokens = np.empty(self._shape, self._dtype)
        try:
            self._codec.decode(packed, tokens)
        except (RuntimeError, ValueError) as error:
            raise CacheDamage(f"{self._file.path.name}: row {row} doesn't decompress") from error
        return tokens


def _parse_strings(payload: bytes, count: int, name: str) -> list[bytes]:
    """The strings of a vlen-utf8 chunk: their count, then (length, bytes) each; numbers are uint32."""
    # No key holds a NUL, so lengths under 256 show as three of them: splitting there is ten times faster.
    quick = payload[4:].split(b"\0\0\0")
    if len(quick) == count + 1 and b"\0\0\0\0" not in payload[4:]:  # four of them: an empty string
        return [*(part[:-1] for part in quick[1:-1]), quick[-1]]
    strings, position = [], 4
    for _ in range(count):
        start = position + 4
        position = start + int.from_bytes(payload[position:start], "little")
        strings.append(payload[start:position])
    if int.from_bytes(payload[:4], "little") != count or position != len(payload):
        raise CacheDamage(f"{name} doesn't hold {count} strings")
    return strings
