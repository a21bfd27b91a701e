"""The caches that a run learns from: opened together, and checked against each other, the images and themselves."""

import functools
import logging
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.cache import CacheReader, LocalFolder, Mirror, Record, RemoteCache, open_cache
from pipeline.cache.budget import readable
from pipeline.configs.cache import CacheInput, default_local
from pipeline.configs.data import ViewConfig
from pipeline.data.decoding import decode
from pipeline.data.images import ImageSource
from pipeline.data.rendering import preprocessing
from pipeline.data.rng import Stream, raw_bits
from pipeline.data.views import View, draw_view
from pipeline.errors import CacheError
from pipeline.files import hash_source

log = logging.getLogger(__name__)


def place_of(cache: CacheInput) -> Path | RemoteCache:
    """What `open_cache` takes."""
    if isinstance(cache.path, Path):
        return cache.path
    local = LocalFolder(cache.local or default_local(), cache.local_limit)
    return RemoteCache(cache.path, local, by_range=cache.read == "range")


def open_caches(paths: Mapping[str, Path | RemoteCache]) -> dict[str, CacheReader]:
    """Open one cache a teacher, its tables loaded; an empty name stands for the name of the cache's own teacher.

    Raises:
        CacheError: a cache is unfinished, or they don't show the same pixels of the same images.
        CacheDamage: a table is damaged.
    """
    readers = {}
    for name, path in paths.items():
        reader = open_cache(path)
        readers[name or reader.header.teacher["name"]] = reader
    for name, reader in readers.items():
        missing = reader.missing_shards()
        if missing:
            raise CacheError(
                f"cache {name} lacks {len(missing)} of {reader.header.shards} shards: finish its extraction"
            )
        _agree(next(iter(readers)), name, readers)
    for reader in readers.values():
        reader.load_tables(len(readers))
    return readers


def _agree(first: str, name: str, readers: Mapping[str, CacheReader]) -> None:
    for what in ("dataset.digest", "preprocessing", "view_policy"):
        expected, found = (operator.attrgetter(what)(readers[teacher].header) for teacher in (first, name))
        if expected != found:
            raise CacheError(
                f"caches {first} and {name} differ in {what} ({expected}, {found}): their teachers did not see the "
                "same pixels; extract both from the same images, with the same views.*, store and libraries"
            )


def mirrors_of(caches: Mapping[str, CacheReader]) -> list[Mirror]:
    """What makes the shards of the remote ones local."""
    return [cache.shards for cache in caches.values() if isinstance(cache.shards, Mirror)]


def require_local_room(mirrors: Sequence[Mirror], block: int, window: int | None) -> None:
    """Refuse a local folder that would fetch shards again and again.

    Args:
        block: samples that the order takes for a shard.
        window: shards that are shuffled together; None stands for all of them.

    Raises:
        CacheError: it holds less than the shards of two windows, the one that is shown and the next; or a cache has
            shards of another size.
    """
    strange = next((mirror for mirror in mirrors if mirror.header.samples_per_shard != block), None)
    if strange is not None:
        raise CacheError(
            f"{strange.remote.url} has {strange.header.samples_per_shard} samples a shard, the first cache {block}, "
            "but remote caches need shards of one size: copy this one to a local folder with `mrmae cache-copy`"
        )
    for folder in {mirror.remote.local for mirror in mirrors}:
        needed = 0
        for mirror in (mirror for mirror in mirrors if mirror.remote.local == folder):
            shards = mirror.header.shards
            count = shards if window is None else min(2 * window, shards)
            needed += mirror.metadata_size() + count * max(map(mirror.size, range(shards)))
        if needed > folder.limit:
            remedy = "set order.kind=block, or give more" if window is None else "give more, or a smaller order.window"
            raise CacheError(
                f"cache.local_limit={readable(folder.limit)} is too little for this order, which needs "
                f"{readable(needed)} in {folder.path}: {remedy}"
            )


def views_of(caches: Mapping[str, CacheReader]) -> ViewConfig:
    """How the views of the caches were drawn."""
    return ViewConfig.model_validate(next(iter(caches.values())).header.view_policy.model_dump())


def live_samples(caches: Mapping[str, CacheReader]) -> NDArray[np.int64]:
    """The samples that every cache holds, ascending.

    Raises:
        CacheError: there is none.
    """
    live: NDArray[np.int64] = functools.reduce(np.intersect1d, (cache.live_indices() for cache in caches.values()))
    if not len(live):
        raise CacheError(f"no sample lives in {' and '.join(caches)}: `mrmae cache-info` says why; extract again")
    return live


def match_images(caches: Mapping[str, CacheReader], source: ImageSource) -> None:
    """Refuse images that the caches were not made of; warn where this machine may render them otherwise.

    Raises:
        CacheError: other images, or another number of them.
    """
    digest = source.digest()
    for name, cache in caches.items():
        if cache.header.dataset.digest != digest:
            raise CacheError(
                f"cache {name} was made of {cache.header.count} images at {cache.header.dataset.source}, not of these "
                f"{len(source)} at {source.root}: give the same data.path and data.limit, restore files whose names or "
                "sizes have changed, or extract again"
            )
        rendering = preprocessing(views_of({name: cache}), "zarr")
        if not cache.stores_images and cache.header.preprocessing != rendering:
            log.warning(
                "the views of cache %s were rendered with %s, this machine has %s: pixels may differ in their last bit",
                name,
                cache.header.preprocessing,
                rendering,
            )


def check_records(
    caches: Mapping[str, CacheReader],
    source: ImageSource | None,
    samples: NDArray[np.int64],
    seed: int,
    count: int = 32,
) -> str:
    """Before a run's first step: hold `count` random records of each cache against the live images.

    Returns:
        What was checked, in words.

    Raises:
        CacheError: a record is damaged, of another image, or of another view than its cache says.
        DataError: an image can't be read any more.
    """
    views = views_of(caches)
    draws = raw_bits(2 * count, Stream.CHECK, seed)
    for which, view in draws.reshape(count, 2):
        index, number = int(samples[int(which) % len(samples)]), int(view) % views.count
        records = {name: cache.read(index, number) for name, cache in caches.items()}
        for name, record in records.items():
            if record.image is not None:
                _check_stored(name, record, views.image_size)
        if source is not None:
            data = source.read(index)
            for name, record in records.items():
                _check_source(name, record, data)
            image = decode(data)
            view = draw_view(views, index, number, image.height, image.width)
            for name, record in records.items():
                _check_view(name, record, view)
    against = "their stored images" if source is None else "the live images (hash, box and flip)"
    return f"{count} random records of {', '.join(caches)}: checksums, and {against}"


def spread_records(
    cache: CacheReader, samples: NDArray[np.int64], count: int, dequantise: bool = True
) -> Iterator[Record]:
    """Records of so many samples, spread evenly over all: of view 0, and of others if there are fewer."""
    chosen = samples[np.arange(min(count, len(samples))) * len(samples) // min(count, len(samples))]
    for view in range(min(cache.header.views, math.ceil(count / len(samples)))):
        for index in chosen.tolist():
            yield cache.read(index, view, dequantise=dequantise)


def _check_stored(name: str, record: Record, size: int) -> None:
    assert record.image is not None
    image = decode(record.image)
    if image.size != (size, size):
        raise CacheError(f"cache {name}: the image of {record.key} has {image.width}x{image.height} pixels, not {size}")


def _check_source(name: str, record: Record, data: bytes) -> None:
    if record.source_hash != hash_source(data):
        raise CacheError(
            f"image {record.key} is not the one that cache {name} was made of: restore it, or extract again"
        )


def _check_view(name: str, record: Record, view: View) -> None:
    if tuple(record.box.tolist()) != view.box or record.hflip != view.hflip:
        raise CacheError(
            f"cache {name}: the view of {record.key} is {record.box.tolist()}, its policy draws {list(view.box)}: the "
            "cache was made by another version of this program; extract again"
        )
