"""Caches of full size that take little disk, to measure and test random reads.

Their small tables are whole: every sample has a key, a hash and a place. Of the records only `filled` are there, random
but sound, and the rest of the large files are holes. Such a cache opens and reads as any other does, sample by sample;
it doesn't pass verification.
"""

from collections.abc import Sequence
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.files import CHECKSUM_BYTES, FileEntry, checksum, file_of
from pipeline.cache.format.commits import FOLDER, Commit, commit_path
from pipeline.cache.format.header import CacheHeader
from pipeline.cache.format.records import TAILS, Raw, Seal
from pipeline.cache.stores import store_of
from pipeline.cache.tar.store import facts_of, index_name, member_header, tar_name
from pipeline.cache.tar.view import FIELDS, SUFFIXES, TensorLayout, padded
from pipeline.cache.writer import create_cache
from pipeline.cache.zarr.chunks import text_chunk
from pipeline.cache.zarr.view import Layout, array_specs, chunk_file


def create_sparse_cache(path: Path, header: CacheHeader, filled: Sequence[int], image_bytes: int = 25_000) -> None:
    """Write a cache of one view, uncompressed, without fsync: it is there to be thrown away.

    Args:
        filled: how many records of each shard are there; see `filled_rows`.
        image_bytes: length of each record's image (random bytes), in the webdataset store.
    """
    create_cache(path, header)
    (path / FOLDER).mkdir(exist_ok=True)
    write = _write_chunks if header.store == "zarr" else _write_tar
    for shard, count in enumerate(filled):
        write(path, header, shard, filled_rows(header, shard, count).tolist(), image_bytes)
        files = {name: FileEntry(bytes=0, xxh3_128="0" * 32) for name in store_of(path, header).files(shard)}
        fields: dict[str, Any] = {"tombstones": [], "fidelity": {}, "times": {}, "fingerprint": header.fingerprint}
        commit = Commit(shard=shard, count=len(header.shard_range(shard)), files=files, **fields)
        commit_path(path, shard).write_bytes(commit.to_bytes())


def filled_rows(header: CacheHeader, shard: int, count: int) -> NDArray[np.int64]:
    """The rows of a shard whose records are there, [count], evenly spread."""
    return np.arange(count) * len(header.shard_range(shard)) // count


def _small(header: CacheHeader, shard: int) -> tuple[list[str], NDArray[Any]]:
    """Keys as ImageNet's and TAILS of a shard's samples, [n]."""
    span, random = header.shard_range(shard), np.random.default_rng(shard)
    tails = np.empty(len(span), TAILS)
    tails["box"], tails["hflip"] = random.integers(1, 400, (len(span), 4)), random.integers(0, 2, len(span))
    tails["source_hash"] = random.integers(2**63, size=len(span))
    return [f"n{shard:08d}/n{shard:08d}_{row}.JPEG" for row in range(len(span))], tails


def _arrays(header: CacheHeader, index: int) -> dict[str, NDArray[Any]]:
    """A record's random arrays: every bit pattern is a sound record as far as reading goes."""
    random = np.random.default_rng(index)
    return {
        name: np.frombuffer(random.bytes(stop - start), dtype).reshape(shape)
        for name, (shape, dtype, start, stop) in Layout(header).places.items()
    }


def _raw(header: CacheHeader, index: int, key: str, tail: Any, image: bytes | None) -> Raw:
    """A record with its checksum."""
    arrays = _arrays(header, index)
    parts = [*arrays.values(), *(() if image is None else (image,))]
    tokens, scale, attention = (arrays.get(name) for name in ("tokens", "scale", "attention"))
    assert tokens is not None
    raw = Raw(key.encode(), tail.tobytes(), 0, tokens, scale, attention, image, parts)
    return raw._replace(crc32c=Seal(header.fingerprint)(index, 0, raw))


def _write_chunks(path: Path, header: CacheHeader, shard: int, rows: list[int], _: int) -> None:
    S, span, layout = header.samples_per_shard, header.shard_range(shard), Layout(header)
    keys, tails = _small(header, shard)
    sums = np.zeros(S, "<u4")
    files = {name: path / chunk_file(name, shard, 0, len(spec[0])) for name, spec in array_specs(header).items()}
    large = {name: files[name].open("wb") for name in layout.names}
    for row in rows:
        raw = _raw(header, span[row], keys[row], tails[row], None)
        sums[row] = raw.crc32c
        for name, part in zip(layout.names, raw.body, strict=True):
            large[name].seek(row * part.nbytes)
            large[name].write(part)
    for name, file in large.items():
        file.truncate(S * (layout.places[name][3] - layout.places[name][2]) + CHECKSUM_BYTES)
        file.close()
    filled = np.zeros(S, TAILS)
    filled[: len(tails)] = tails
    for name, array in {"crc32c": sums, **{name: filled[name] for name in ("box", "hflip", "source_hash")}}.items():
        payload = array.tobytes()
        files[name].write_bytes(payload + checksum(payload))
    files["key"].write_bytes(b"".join(text_chunk(keys, S)))


def _write_tar(path: Path, header: CacheHeader, shard: int, rows: list[int], image_bytes: int) -> None:
    span, layout = header.shard_range(shard), TensorLayout(header)
    keys, tails = _small(header, shard)
    places = np.empty((len(span), FIELDS), "<i8")
    step = 3 * BLOCKSIZE + padded(image_bytes) + padded(layout.bytes) + BLOCKSIZE
    places[:] = 0, image_bytes, layout.bytes, BLOCKSIZE
    places[:, 0] = step * np.arange(len(span))
    with file_of(path, tar_name(shard, 0)).open("wb") as tar:
        for row in rows:
            image = np.random.default_rng([span[row], 1]).bytes(image_bytes)
            raw = _raw(header, span[row], keys[row], tails[row], image)
            members = ([image], layout.write(raw), [facts_of(raw, raw.crc32c)])
            places[row, 3] = len(members[2][0])
            tar.seek(places[row, 0])
            for suffix, parts, size in zip(SUFFIXES, members, places[row, 1:].tolist(), strict=True):
                tar.writelines([member_header(f"{span[row]:09d}.{suffix}", size), *parts, bytes(-size % BLOCKSIZE)])
        tar.truncate(step * len(span) + 2 * BLOCKSIZE)
    payload = places.tobytes()
    file_of(path, index_name(shard, 0)).write_bytes(payload + checksum(payload))
