"""What a cache is made of: records, shards of them, and what a store must offer.

A store knows how a shard lies on the disk. `CacheWriter` and `CacheReader` add commits, tombstones, checks and the LRU
of open shards, the same for every store.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple, Protocol

import numpy as np
from awscrt.checksums import crc32c
from numpy.typing import NDArray

from pipeline.cache.files import Descriptor, FileEntry

TAIL = Struct("<4iBQ")  # box (top, left, height, width), hflip, source hash: as a record's checksum covers them
TAILS: np.dtype[Any] = np.dtype([("box", "<i4", 4), ("hflip", "u1"), ("source_hash", "<u8")])  # the same for numpy
_HEAD = Struct("<QI")  # sample index, view


@dataclass(slots=True)
class ShardData:
    """Every record of one shard: n samples (the shard's range), V views, L tokens, D channels, H heads.

    R is L, or L + 1 where the cache has a summary, which is row 0. Rows of tombstones may hold anything: the writer
    sets them to zero.
    """

    tokens: NDArray[Any]  # [n, V, R, D], for int4 [n, V, R, D/2], for codes [n, V, R, 1], as quantised
    scale: NDArray[np.float16] | None  # [n, V, R], int8 and int4 only
    attention: NDArray[np.float16] | None  # [n, V, L], [n, V, H, L], or None when the cache keeps none
    box: NDArray[np.int32]  # [n, V, 4] top, left, height, width in source pixels
    hflip: NDArray[np.uint8]  # [n, V] 1 = mirrored
    source_hash: NDArray[np.uint64]  # [n], see `hash_source`
    keys: list[str]  # n
    images: list[list[bytes] | None] | None = None  # n × V JPEG files, for stores that keep images; None at tombstones
    tombstones: dict[int, str] = field(default_factory=dict)  # sample index → why it can't be read, one line
    fidelity: dict[str, Any] = field(default_factory=dict)  # `FidelityFigures.model_dump()`
    times: dict[str, Any] = field(default_factory=dict)  # free, JSON; the only part that may differ between runs

    def record(self, row: int, view: int) -> "Raw":
        """One record on its way to the disk, its checksum still 0."""
        images = None if self.images is None else self.images[row]
        tokens = self.tokens[row, view]
        scale = None if self.scale is None else self.scale[row, view]
        attention = None if self.attention is None else self.attention[row, view]
        image = None if images is None else images[view]
        return Raw(
            key=self.keys[row].encode(),
            tail=TAIL.pack(*self.box[row, view].tolist(), int(self.hflip[row, view]), int(self.source_hash[row])),
            crc32c=0,
            tokens=tokens,
            scale=scale,
            attention=attention,
            image=image,
            body=[part for part in (tokens, scale, attention, image) if part is not None],
        )


class Raw(NamedTuple):
    """One record as it lies in the store, before any check."""

    key: bytes  # UTF-8
    tail: bytes  # TAIL
    crc32c: int
    tokens: NDArray[Any]  # [R, D], for int4 [R, D/2], for codes [R, 1]
    scale: NDArray[np.float16] | None  # [R]
    attention: NDArray[np.float16] | None  # [L] or [H, L]
    image: bytes | None
    body: Sequence[Any]  # buffers that make up tokens‖scale‖attention‖image, as the checksum covers them


class Record:
    """One checked view of one sample.

    `tokens` is [L, D] as stored (for int4 [L, D/2], for codes [L, 1]), or float32 [L, D] when dequantised; `scale`
    float16 [L] or None; `attention` float16 [L], [H, L] or None; `image` the stored JPEG or None. `summary` [1, D] and
    `summary_scale` [1] are the teacher's class token in the same forms, or None.
    """

    __slots__ = (
        "_key", "_tail", "attention", "image", "index", "scale", "summary", "summary_scale", "tokens", "view",
    )  # fmt: skip

    def __init__(self, index: int, view: int, raw: Raw, has_summary: bool) -> None:
        self.index = index
        self.view = view
        self.tokens, self.scale, self.attention = raw.tokens, raw.scale, raw.attention
        self._key, self._tail, self.image = raw.key, raw.tail, raw.image
        self.summary = self.summary_scale = None
        if has_summary:
            self.summary, self.tokens = raw.tokens[:1], raw.tokens[1:]
            if raw.scale is not None:
                self.summary_scale, self.scale = raw.scale[:1], raw.scale[1:]

    @property
    def key(self) -> str:
        """The sample's name in the dataset."""
        return self._key.decode()

    @property
    def box(self) -> NDArray[np.int32]:
        """int32 [4]: top, left, height, width in source pixels."""
        return np.frombuffer(self._tail, "<i4", 4)

    @property
    def hflip(self) -> bool:
        return self._tail[16] != 0

    @property
    def source_hash(self) -> int:
        """`hash_source` of the image file that the view was cut from."""
        return int.from_bytes(self._tail[17:], "little")


class Seal:
    """The crc32c of a record: fingerprint‖index‖view‖key‖box‖hflip‖source_hash‖tokens‖scale‖attention‖image.

    It starts from the cache's fingerprint: a swapped or foreign record fails too, not only a damaged one.
    """

    def __init__(self, fingerprint: str) -> None:
        self._start: int = crc32c(bytes.fromhex(fingerprint))

    def __call__(self, index: int, view: int, raw: Raw) -> int:
        crc: int = crc32c(_HEAD.pack(index, view) + raw.key + raw.tail, self._start)
        for part in raw.body:
            crc = crc32c(part, crc)
        return crc


class RecordFile(Protocol):
    """A file that records are read from: local (`Descriptor`), or behind a URL."""

    @property
    def path(self) -> Path:
        """What messages call it."""
        ...

    def read_parts(self, parts: Sequence[Any], size: int, offset: int) -> None:
        """Fill several buffers of `size` bytes together, one behind the other. Raises CacheDamage."""
        ...

    def expect(self, size: int, offset: int) -> None:
        """Start to fetch what the next `read_parts` with these arguments will want; a local file does nothing."""
        ...


class ShardFiles(Protocol):
    """The files of committed shards, wherever they are."""

    def open_file(self, shard: int, file: str) -> RecordFile:
        """A file for reading records. Raises CacheDamage: it is missing, or no regular file."""
        ...

    def size_of(self, shard: int, file: str) -> int:
        """Bytes of a file that may not be here yet. Raises CacheDamage as above."""
        ...


class LocalFiles:
    """The files of a cache that lie in its folder."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)

    def open_file(self, shard: int, file: str) -> Descriptor:
        return Descriptor(f"{self._root}/{file}")

    def size_of(self, shard: int, file: str) -> int:
        return self.open_file(shard, file).size()


class OpenView(Protocol):
    """One view of one shard, open for reading; `row` counts from the shard's first sample."""

    def read(self, row: int, keep: bool = True) -> Raw:
        """One record, unchecked; without `keep`, its arrays and body are overwritten by this thread's next read.

        Raises CacheDamage where the record can't even be found.
        """
        ...

    def expect(self, row: int) -> None:
        """Start to fetch a record behind a URL, which must be read next or soon."""
        ...


class Store(Protocol):
    """How shards lie on the disk. Paths in results are relative to the cache's folder, with slashes."""

    stores_images: bool
    entries: frozenset[str]  # the names that `create` makes in the cache's folder
    descriptors: int  # that one open view holds

    def create(self) -> None:
        """Write what must exist before the first shard; harmless when repeated, an error over other content."""
        ...

    def files(self, shard: int) -> list[str]:
        """The files that the shard's commit record lists."""
        ...

    def tables(self, shard: int) -> list[str]:
        """The files that `table` reads: small ones, which stay in the local copy of a remote cache."""
        ...

    def record_files(self, shard: int) -> list[str]:
        """The files of which a reader may fetch single records: those with nearly all bytes."""
        ...

    def write(self, shard: int, data: ShardData, seal: Seal) -> dict[str, FileEntry]:
        """Write a checked shard, each file atomically and durably, and return what `files` names."""
        ...

    def table(self, shard: int, view: int | None, fresh: bool = False) -> bytes:
        """The small facts that find and check the records of one view of a committed shard, or (None) of all views.

        Read from the disk and checked; `fresh` makes them from the data, where a file that no commit covers holds them.
        Raises CacheDamage.
        """
        ...

    def open_view(self, shard: int, view: int, shared: Any, table: Any) -> OpenView:
        """Open one view of a committed shard, given its tables (buffers): of all views, and its own.

        Raises CacheDamage.
        """
        ...

    def uncovered(self, shard: int | None, thorough: bool) -> dict[str, str]:
        """Check files that no commit record covers: those of one shard, or of the whole cache (None).

        Returns file → what is wrong with it. `thorough` makes them again and compares.
        """
        ...

    def derived(self, shard: int | None) -> list[str]:
        """The files that `uncovered` checks: those of one shard, or of the whole cache (None)."""
        ...

    def rebuild(self, file: str) -> None:
        """Write one of the files of `uncovered` again."""
        ...
