"""What `benchmark cache` compares the cache with: loops over the same bytes that do the least that could do the job."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import webdataset
import xxhash

from pipeline.cache import CacheReader

Checksum = Callable[[bytes], int]


@contextmanager
def plain_reads(reader: CacheReader, indices: list[int], folder: Path) -> Iterator[Callable[[Checksum], None]]:
    """A function: one pread and one checksum for each part of each record, from plain files.

    A record has as many parts as files: one for each array in the zarr store, all in one in the webdataset store.
    """
    spans: dict[int, list[tuple[int, int, int]]] = {}  # sample → descriptor, size, offset of each part
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(4)]
        for index in sorted(indices):
            record = reader.read(index, 0)
            arrays = [array for array in (record.tokens, record.scale, record.attention) if array is not None]
            parts = [array.tobytes() for array in arrays]
            if record.image is not None:
                parts = [b"".join([record.image, *parts])]
            spans[index] = [(file.fileno(), len(part), file.tell()) for file, part in zip(files, parts, strict=False)]
            for file, part in zip(files, parts, strict=False):
                file.write(part)
        for file in files:
            file.flush()

        def read(checksum: Checksum) -> None:
            for index in indices:
                for descriptor, size, offset in spans[index]:
                    checksum(os.pread(descriptor, size, offset))

        yield read


@contextmanager
def npy_reads(reader: CacheReader, indices: list[int], folder: Path) -> Iterator[Callable[[], None]]:
    """A job: the same records, with their images if there are any, as .npy members of a tar, decoded by webdataset."""
    path = folder / "npy.tar"
    with webdataset.TarWriter(str(path)) as tar:
        for index in indices:
            record = reader.read(index, 0)
            members: dict[str, Any] = {
                "tokens.npy": record.tokens,
                "scale.npy": record.scale,
                "attention.npy": record.attention,
                "jpg": record.image,  # stays bytes in both
            }
            tar.write({"__key__": f"{index:09d}", **{k: v for k, v in members.items() if v is not None}})

    def decode() -> None:
        for _ in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False).decode():
            pass

    try:
        yield decode
    finally:
        path.unlink()


def digest_files(files: Iterable[Path]) -> None:
    """xxh3-128 of each file, as the standard library reads it."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            hashlib.file_digest(file, xxhash.xxh3_128)


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write files and make them durable, each and then their folders."""
    folders = {path.parent for path in contents}
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for path, content in contents.items():
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    for folder in folders:
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def reads_and_bytes(job: Callable[[], object]) -> tuple[int, int]:
    """Reading system calls of a job in this process, and their bytes, once it has opened its files."""
    job()
    first, second = _io(), _io()  # to look is to read
    job()
    reads, size = (after - 2 * before + start for start, before, after in zip(first, second, _io(), strict=True))
    return reads, size


def _io() -> tuple[int, int]:
    """Reading system calls of this process so far, and their bytes."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["syscr"]), int(counts["rchar"])
