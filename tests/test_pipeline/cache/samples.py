"""Small caches of both stores, made without any teacher: what the tests of this wing share."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from pipeline.cache import CacheHeader, Quantiser, QuantiserName, ShardData, create_cache, open_writer
from pipeline.files import hash_source

STORES = ("zarr", "webdataset")
CLUSTERS = 8  # of a cache of codes
SUMMARIES = (None, "class")
# Attention, quantiser and summary of caches that are not alike.
LAYOUTS = [
    *((attention, quantiser, None) for quantiser in get_args(QuantiserName) for attention in ("mean", "heads")),
    *(
        (attention, quantiser, "class")
        for quantiser in ("int8", "int4", "float16", "float32")
        for attention in ("none", "heads")
    ),
    ("none", "codes", None),
]
SUMMARY_SCALE = 50.0


def make_header(store: str = "zarr", **changes: Any) -> CacheHeader:
    """A cache of 10 samples, 4 a shard, 2 views, 3×2 tokens of 8 channels; keyword arguments replace sections."""
    name = changes.pop("quantiser_name", "int8")
    dim = changes.pop("dim", 8)
    grid = changes.pop("grid", [3, 2])
    tokens = torch.from_numpy(np.random.default_rng(7).normal(size=(4, 6, dim)).astype(np.float32))
    quantiser = Quantiser.calibrate(name, tokens, CLUSTERS).to_json()
    if changes.get("summary") and name in ("int8", "int4"):
        of_summary = Quantiser.calibrate(name, SUMMARY_SCALE * tokens[:, :1]).to_json()
        quantiser |= {"summary_mean": of_summary["mean"], "summary_std": of_summary["std"]}
    sections: dict[str, Any] = {
        "store": store,
        "dataset": {"source": "photos", "kind": "folder", "count": 10, "digest": "d" * 32},
        "teacher": {"name": "fake", "spec": "fake", "weights_sha256": "0" * 64, "grid": grid, "dim": dim},
        "preprocessing": {"mean": [0.5, 0.5, 0.5], "resize": "bicubic"},
        "views": {"count": 2, "seed": 3, "image_size": 32},
        "quantiser": quantiser,
        "samples_per_shard": 4,
    }
    return CacheHeader(**(sections | changes))


def source_bytes(index: int) -> bytes:
    """The image file of a sample, as far as the cache is concerned."""
    return f"image {index}".encode() * (index % 50 + 1)


def key_of(index: int) -> str:
    return f"class.{index % 3}/фото {index}.jpeg"


def float_tokens(header: CacheHeader, index: int, view: int) -> torch.Tensor:
    """What the fake teacher says, [L, D]; the same whenever it is asked."""
    generator = np.random.default_rng([index, view])
    return torch.from_numpy(generator.normal(size=(header.tokens, header.dim)).astype(np.float32))


def float_summary(header: CacheHeader, index: int, view: int) -> torch.Tensor:
    """The fake teacher's class token, [1, D], of another scale than its tokens."""
    generator = np.random.default_rng([index, view, 2])
    return SUMMARY_SCALE * torch.from_numpy(generator.normal(size=(1, header.dim)).astype(np.float32))


def attention_of(header: CacheHeader, index: int, view: int) -> np.ndarray | None:
    """Attention that sums to 1, float32 [L] or [H, L]."""
    if header.attention_shape is None:
        return None
    values = np.random.default_rng([index, view, 1]).uniform(0.1, 1, size=header.attention_shape).astype(np.float32)
    return values / values.sum(-1, keepdims=True)


def make_shard(header: CacheHeader, shard: int, tombstones: dict[int, str] | None = None) -> ShardData:
    """Deterministic content of one shard."""
    span, V = header.shard_range(shard), header.views
    tombstones = {i: e for i, e in (tombstones or {}).items() if i in span}
    tokens = torch.stack([torch.stack([float_tokens(header, i, v) for v in range(V)]) for i in span])
    stored, scale = header.quantiser.quantise(tokens)
    if header.summary is not None:
        summaries = torch.stack([torch.stack([float_summary(header, i, v) for v in range(V)]) for i in span])
        rows, scales = header.summary_quantiser.quantise(summaries)
        stored = torch.cat([rows, stored], 2)
        scale = None if scale is None or scales is None else torch.cat([scales, scale], 2)
    attention = None
    if header.attention_shape is not None:
        rows = [np.stack([attention_of(header, i, v) for v in range(V)]) for i in span]
        attention = np.stack(rows).astype(np.float16)
    box = np.array([[[i, v, i + 1, v + 1] for v in range(V)] for i in span], np.int32)
    images = [None if i in tombstones else [b"\xff\xd8" + source_bytes(i) + bytes([v]) for v in range(V)] for i in span]
    return ShardData(
        tokens=stored.numpy(),
        scale=None if scale is None else scale.numpy(),
        attention=attention,
        box=box,
        hflip=(box[..., 0] + box[..., 1]).astype(np.uint8) % 2,
        source_hash=np.array([hash_source(source_bytes(i)) for i in span], np.uint64),
        keys=[key_of(i) for i in span],
        images=images if header.store == "webdataset" else None,
        tombstones=tombstones,
        times={"seconds": 1.5},
    )


def make_cache(path: Path, header: CacheHeader, tombstones: dict[int, str] | None = None) -> Path:
    """A finished cache at `path`."""
    create_cache(path, header)
    writer = open_writer(path)
    for shard in range(header.shards):
        writer.write_shard(shard, make_shard(header, shard, tombstones))
    return path
