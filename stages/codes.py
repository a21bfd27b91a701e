"""Make a cache of codes from a cache of tokens: two bytes a token, for mimic.target=codes.

Fits a codebook to the tokens of some samples, and stores of each token the number of the nearest centroid:

    mrmae codes cache.path=/data/clip output=/data/clip_codes clusters=4096
    mrmae pretrain data.path=/data/imagenet/train cache.path=/data/clip_codes mimic.target=codes output=runs/codes

Reads every record of a finished cache (cache.path, also a URL), no images and no teacher. Writes a cache of the same
store, views and shards to output: 392 bytes of codes a view for 196 tokens, and what the other holds beside its tokens.
Costs one reading of the cache and a comparison of each token with all centroids, on the accelerator if there is one.
Without a cache of tokens, extract-teacher-features cache.quantiser=codes does the same. A class token is left out.

Run the command again after a stop: finished shards are kept.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.assembly.caches import open_caches, place_of, spread_records
from pipeline.cache import (
    CacheHeader,
    CacheReader,
    Fidelity,
    FidelityFigures,
    Quantiser,
    Record,
    ShardArrays,
    ShardBuffers,
    ShardData,
    create_cache,
    match_header,
    open_writer,
    read_commit,
    read_header,
)
from pipeline.cache.budget import readable
from pipeline.cache.format.codes import samples_for
from pipeline.ownership import stage
from pipeline.processes import processes
from pipeline.progress import Progress
from stages.configs.codes import CodesConfig

_BATCH = 64  # records whose tokens are compared with the centroids at once


@stage
def run(config: CodesConfig) -> dict[str, Any]:
    """Write every shard that isn't there yet; returns what was done.

    Raises:
        CacheError: the source is unfinished or has too few tokens, or the folder holds another cache.
        CacheDamage: a record of the source is damaged.
    """
    (source,) = open_caches({"": place_of(config.cache)}).values()
    header = _open(config, source)
    writer, buffers = open_writer(config.output), ShardBuffers(header)
    todo = [shard for shard in range(header.shards) if not writer.is_committed(shard)]
    total = header.views * sum(len(header.shard_range(shard)) for shard in todo)
    with Progress(total, "codes", "view") as progress:
        for shard in todo:
            content = _encode(source, header, shard, buffers.take(len(header.shard_range(shard))))
            writer.clean_partial(shard)
            writer.write_shard(shard, content)
            buffers.give_back(content)
            progress.advance(header.views * len(content.keys))
    commits = [read_commit(config.output, header, shard) for shard in range(header.shards)]
    size = sum(entry.bytes for commit in commits for entry in commit.files.values())
    figures = FidelityFigures.merge(commit.fidelity for commit in commits)
    facts = {"cache": str(config.output), "shards": len(todo), "size": readable(size)}
    return facts | (figures.model_dump(exclude_none=True) if figures else {})


def _open(config: CodesConfig, source: CacheReader) -> CacheHeader:
    """The header of the new cache, which is created unless it is there."""
    kept = source.header.model_dump(by_alias=True, exclude={"version", "summary"})

    def header_of(quantiser: dict[str, Any]) -> CacheHeader:
        return CacheHeader.model_validate(kept | {"quantiser": quantiser})

    wish = header_of({"name": "codes", "clusters": config.clusters})
    if not (config.output / "cache.json").is_file():
        samples = samples_for(config.clusters, source.header.tokens, config.calibration)
        tokens = _tokens(source, list(spread_records(source, source.live_indices(), samples, dequantise=False)))
        state = Quantiser.calibrate("codes", tokens, config.clusters).to_json()
        create_cache(config.output, header_of(state | {"calibration": samples}))
    found = read_header(config.output)
    match_header(config.output, found, wish)
    return found


def _encode(source: CacheReader, header: CacheHeader, shard: int, arrays: ShardArrays) -> ShardData:
    """The content of one shard; rows of tombstones stay as they were."""
    span, stones = header.shard_range(shard), read_commit(source.path, source.header, shard).tombstones
    lost = {stone.index: stone for stone in stones}
    n, views = len(span), header.views
    data = ShardData(
        tokens=arrays.tokens,
        scale=None,
        attention=arrays.attention,
        box=np.zeros((n, views, 4), np.int32),
        hflip=np.zeros((n, views), np.uint8),
        source_hash=np.zeros(n, np.uint64),
        keys=[lost[index].key if index in lost else "" for index in span],
        images=[[] for _ in span] if source.stores_images else None,
        tombstones={stone.index: stone.error for stone in stones},
    )
    fidelity = Fidelity()
    places = [(index, view) for index in span if index not in lost for view in range(views)]
    for start in range(0, len(places), _BATCH):
        records = [source.read(*place) for place in places[start : start + _BATCH]]
        _add(data, records, _tokens(source, records), header, fidelity)
    data.fidelity = fidelity.figures(header.quantiser.std).model_dump(exclude_none=True)
    return data


def _tokens(source: CacheReader, records: Sequence[Record]) -> Tensor:
    """The tokens of records, float32 [N, L, D], dequantised on the device."""
    device = processes().device
    stored = torch.from_numpy(np.stack([record.tokens for record in records])).to(device)
    scales = [record.scale for record in records if record.scale is not None]
    scale = torch.from_numpy(np.stack(scales)).to(device) if scales else None
    tokens: Tensor = source.header.quantiser.dequantise(stored, scale)
    return tokens


def _add(data: ShardData, records: Sequence[Record], tokens: Tensor, header: CacheHeader, fidelity: Fidelity) -> None:
    """Put records of one shard where they belong, `tokens` as codes."""
    codes, _ = header.quantiser.quantise(tokens)
    fidelity.update(tokens, header.quantiser.dequantise(codes, None))
    for record, code in zip(records, codes.cpu().numpy(), strict=True):
        row, view = record.index % header.samples_per_shard, record.view
        data.tokens[row, view] = code
        if data.attention is not None:
            data.attention[row, view] = record.attention
        data.box[row, view], data.hflip[row, view] = record.box, record.hflip
        data.source_hash[row], data.keys[row] = record.source_hash, record.key
        images = None if data.images is None else data.images[row]
        if images is not None and record.image is not None:
            images.append(record.image)  # views ascend
