"""Caches of random tensors, to measure reading and writing without a teacher."""

from pathlib import Path

import numpy as np

from pipeline.cache import (
    CacheHeader,
    DatasetSection,
    Quantiser,
    QuantiserName,
    ShardData,
    ViewSection,
    create_cache,
    open_writer,
)


def random_header(
    store: str, samples: int, samples_per_shard: int, grid: int, dim: int, quantiser: QuantiserName = "int8"
) -> CacheHeader:
    """One view of each sample, tokens of a square grid, with attention."""
    return CacheHeader.model_validate(
        {
            "store": store,
            "dataset": DatasetSection(source="random", kind="random", count=samples, digest="none"),
            "teacher": {"name": "random", "grid": [grid, grid], "dim": dim},
            "preprocessing": {},
            "views": ViewSection(count=1, seed=0, image_size=16 * grid),
            "quantiser": Quantiser(
                quantiser, np.zeros(dim, np.float32), np.ones(dim, np.float32), np.zeros((128, dim), np.float16)
            ).to_json(),
            "samples_per_shard": samples_per_shard,
        }
    )


def random_shard(header: CacheHeader, shard: int, image_bytes: int) -> ShardData:
    """A shard's content; for the webdataset store with images of random bytes."""
    random = np.random.default_rng(shard)
    n, L = len(header.shard_range(shard)), header.tokens
    images: list[list[bytes] | None] = [[random.bytes(image_bytes)] for _ in range(n)]
    return ShardData(
        tokens=random.integers(0, 128, (n, 1, L, header.stored_dim), np.uint8).astype(header.quantiser.dtype),
        scale=random.uniform(0.01, 0.1, (n, 1, L)).astype(np.float16) if header.quantiser.has_scale else None,
        attention=np.full((n, 1, L), 1 / L, np.float16),
        box=np.ones((n, 1, 4), np.int32),
        hflip=np.zeros((n, 1), np.uint8),
        source_hash=random.integers(2**63, size=n).astype(np.uint64),
        keys=[f"n{shard:08d}/n{shard:08d}_{row}.JPEG" for row in range(n)],
        images=images if header.store == "webdataset" else None,
    )


def write_random_cache(path: Path, header: CacheHeader, image_bytes: int) -> None:
    create_cache(path, header)
    writer = open_writer(path)
    for shard in range(header.shards):
        writer.write_shard(shard, random_shard(header, shard, image_bytes))
