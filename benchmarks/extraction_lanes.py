"""What benchmarks run of extraction: the bare forward, the stage, and the stage with a forward that costs nothing."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.configs.extract import FREE_SHARDS
from benchmarks.harness import Bench
from pipeline.assembly.extraction import Extractor
from pipeline.assembly.filling import PendingTargets
from pipeline.cache import CacheHeader, QuantiserName, create_cache, open_writer
from pipeline.configs.data import ViewConfig
from pipeline.data.rendering import RenderedViews
from pipeline.teachers import Teacher


def bare_forward(teacher: Teacher, views: Tensor, total: int, bench: Bench) -> Callable[[], None]:
    """A job: the network alone on `total` views, which come round again."""
    model: Any = teacher.model
    forward: Callable[[Tensor], Any] = getattr(model, "forward_tokens", model)  # our encoders', or the library's
    if teacher.compiled:
        forward = torch.compile(forward)
    pixels = teacher.prepare(views)

    def job() -> None:
        with torch.no_grad(), bench.autocast():
            for done in range(0, total, len(pixels)):
                forward(pixels[: total - done])

    return job


def write_caches(
    extractor: Extractor,
    folder: Path,
    samples_per_shard: int,
    progress: Callable[[int], None] = lambda images: None,
    quantiser: QuantiserName = "int8",
) -> tuple[float, float]:
    """Extract all images into new caches, folder/0 and on, one a teacher.

    Returns:
        Seconds without calibration and the creation of the caches: on the clock, and of this thread's own work.
    """
    bounds = {"max_nmse": float("inf"), "min_cosine": 0.0}
    headers = extractor.describe("mean", samples_per_shard, extractor.calibrate(quantiser, 16))
    paths = [folder / str(number) for number in range(len(headers))]
    for path, header in zip(paths, headers, strict=True):
        create_cache(path, header)
    writers = [open_writer(path) for path in paths]
    began, busy = time.perf_counter(), time.thread_time()
    extractor.run(writers, range(headers[0].shards), bounds, progress)
    return time.perf_counter() - began, time.thread_time() - busy


class FreeForward(Extractor):
    """Extraction where each batch is one batch that was rendered and taught before: only the shards cost something.

    Args:
        views_in_all: of the images, which come round again, in `FREE_SHARDS` shards.
    """

    def __init__(self, extractor: Extractor, views_in_all: int) -> None:
        count = extractor.views.count
        per_shard = max(1, views_in_all // count // FREE_SHARDS)
        size = min(per_shard, max(1, extractor.batch_size // count))
        self.samples_per_shard = per_shard - per_shard % size  # whole batches alone
        images = extractor.source.select(np.arange(self.samples_per_shard * FREE_SHARDS) % len(extractor.source))
        super().__init__(images, extractor.views, extractor.teachers, size * count, 0, extractor.store)
        self.ready = next(super().batches([range(size)], extractor.views))
        self.pending: PendingTargets | None = None

    def batches(self, chunks: Iterable[Sequence[int]], views: ViewConfig) -> Iterator[RenderedViews]:
        return (replace(self.ready, indices=list(chunk)) for chunk in chunks)

    def start(self, batch: RenderedViews, headers: Sequence[CacheHeader]) -> PendingTargets:
        self.pending = self.pending or super().start(self.ready, headers)
        return PendingTargets(batch, self.pending.wait()[1], None)
