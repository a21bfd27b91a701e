"""Stage 1's core: images → views → teachers → quantise → shards. What extraction, repair and deep checks share.

A batch walks down one way, each station at work on another batch: decode workers (processes) → pinned pixels → the
accelerator (forward, quantise, start copying back) → the shard being filled → the shard being written (a thread). An
accelerator is handed its next batch before the results of the last are waited for. Every queue is bounded, and at most
three shards a teacher are in memory (one being filled, two being written), so a slow disk slows extraction down and
fills nothing.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.assembly.filling import PendingTargets, ShardInProgress, StoredTargets, start_copies, store_targets
from pipeline.cache import (
    CacheHeader,
    CacheWriter,
    FidelityFigures,
    Quantiser,
    Reextracted,
    ShardBuffers,
    ShardData,
    ShardWriting,
)
from pipeline.cache.format.codes import samples_for
from pipeline.configs.data import ViewConfig
from pipeline.data.images import ImageSource
from pipeline.data.loader import load
from pipeline.data.rendering import RenderedViews, ViewRenderer, preprocessing
from pipeline.errors import DataError, TeacherError
from pipeline.teachers import Teacher, TeacherOutput, run_teachers, share_backbones


@dataclass
class Extractor:
    """One or more teachers over one dataset, for any of its shards; each teacher has a cache of its own.

    Each image is decoded once for all teachers, and teachers of equal weights and input share one forward. A cache
    doesn't depend on which other teachers were there.

    Args:
        batch_size: views per forward pass; never across shards, so a shard's bytes depend on nothing outside it.
        workers: decoding processes.
        store: the kind of cache that is written; webdataset needs the views as JPEG.
    """

    source: ImageSource
    views: ViewConfig
    teachers: Sequence[Teacher]
    batch_size: int
    workers: int
    store: str

    def __post_init__(self) -> None:
        share_backbones(self.teachers)

    def describe(
        self, attention: str, samples_per_shard: int, quantisers: Sequence[dict[str, Any]], summary: bool = False
    ) -> list[CacheHeader]:
        """The headers of the caches that this extractor would write, one a teacher.

        Raises TeacherError: a `summary` is wanted of a teacher without a class token.
        """
        common = {
            "store": self.store,
            "dataset": {
                "source": self.source.root,
                "kind": self.source.kind,
                "count": len(self.source),
                "digest": self.source.digest(),
            },
            "preprocessing": preprocessing(self.views, self.store),
            "views": self.views.model_dump(mode="json"),
            "samples_per_shard": min(samples_per_shard, len(self.source)),  # a zarr chunk is padded to its full size
        }
        headers = []
        for teacher, quantiser in zip(self.teachers, quantisers, strict=True):
            if summary and not teacher.has_summary:
                raise TeacherError(f"teacher '{teacher.name}' has no class token to keep: set cache.summary=false")
            identity = teacher.identity()
            kept = attention if teacher.has_attention else "none"
            heads = identity["num_heads"] if kept == "heads" else 0
            fields = {"teacher": identity, "quantiser": quantiser, "attention": kept, "heads": heads}
            headers.append(CacheHeader.model_validate(common | fields | ({"summary": "class"} if summary else {})))
        return headers

    def calibrate(self, name: str, samples: int, summary: bool = False, clusters: int = 0) -> list[dict[str, Any]]:
        """The quantiser of each teacher as a header has it, with channel statistics of the outputs of `sample`.

        A codebook of so many `clusters` takes more samples where `samples` have too few tokens for it.

        Raises:
            DataError: none of the samples can be decoded. CacheError: all of them have fewer tokens than clusters.
        """
        if not Quantiser(name).standardises:
            return [Quantiser(name).to_json() for _ in self.teachers]
        tokens = min(math.prod(teacher.grid) for teacher in self.teachers)
        samples = samples_for(clusters, tokens, samples)
        states = []
        for teacher, output in zip(self.teachers, self.sample(samples), strict=True):
            on_device = output.tokens.to(teacher.device) if clusters else output.tokens
            state = {**Quantiser.calibrate(name, on_device, clusters).to_json(), "calibration": samples}
            if summary and output.summary is not None:
                of_summary = Quantiser.calibrate(name, output.summary)
                state |= {"summary_mean": of_summary.mean.tolist(), "summary_std": of_summary.std.tolist()}
            states.append(state)
        return states

    def sample(self, samples: int) -> list[TeacherOutput]:
        """Each teacher's tokens and summaries, without attention, of view 0 of samples spread evenly over the dataset.

        The first ones of a class-folder tree would all be of one class. Unreadable ones are passed over.

        Raises:
            DataError: none of them can be decoded.
        """
        views = self.views.model_copy(update={"count": 1})
        outputs: list[list[TeacherOutput]] = [[] for _ in self.teachers]
        count = min(samples, len(self.source))
        spread = np.arange(count, dtype=np.int64) * len(self.source) // count
        for batch in self._render_batches(spread.tolist(), views):
            if batch.readable:
                for outputs_of_teacher, out in zip(outputs, self._forward(batch), strict=True):
                    summary = None if out.summary is None else out.summary.cpu()
                    outputs_of_teacher.append(TeacherOutput(out.tokens.cpu(), None, summary=summary))
        if not outputs[0]:
            raise DataError(f"none of {count} images, spread over all, can be decoded: check data.path")
        return [_join(batches) for batches in outputs]

    def run(
        self,
        writers: Sequence[CacheWriter],
        shards: Sequence[int],
        bounds: Mapping[str, float],
        progress: Callable[[int], None] = lambda images: None,
        max_tombstones: float = 1.0,
    ) -> "Summary":
        """Extract the shards and write each into the caches that lack it, committed as soon as it is whole.

        Args:
            max_tombstones: share of the dataset; a run that loses more stops at the shard that goes beyond it.

        Raises:
            CacheError: a shard lost more in quantisation than `bounds` (of `FidelityFigures.check`) allow.
            DataError: more images than `max_tombstones` can't be read.
        """
        summary = Summary()
        with ShardWriting(writers) as writing:

            def advance(images: int) -> None:
                writing.check()  # with every batch: a full disk need not wait for the end of a shard
                progress(images)

            for shard, contents in self.shards([writer.header for writer in writers], shards, advance, writing.buffers):
                summary.add(contents[0])
                check_lost(self.source, summary.tombstones, max_tombstones)
                for content in contents:
                    FidelityFigures.model_validate(content.fidelity).check(**bounds)
                writing.submit(shard, contents)
        return summary

    def shards(
        self,
        headers: Sequence[CacheHeader],
        shards: Sequence[int],
        progress: Callable[[int], None] = lambda images: None,
        buffers: Sequence[ShardBuffers] | None = None,
    ) -> Iterator[tuple[int, list[ShardData]]]:
        """Each shard's content for each teacher's cache, whole, in the order asked for.

        Args:
            buffers: where the large arrays come from, one a header; the caller gives them back.
        """
        buffers = buffers or [ShardBuffers(header) for header in headers]
        span = headers[0].shard_range  # the same for all: one dataset, one number of samples a shard
        chunks = [(shard, chunk) for shard in shards for chunk in _chunks(span(shard), self._samples_per_batch)]
        batches = self.batches([chunk for _, chunk in chunks], self.views)
        pending = _one_ahead(self.start(batch, headers) for batch in batches)
        for shard, group in groupby(zip((shard for shard, _ in chunks), pending, strict=True), key=itemgetter(0)):
            began = time.time()
            filling = [
                ShardInProgress(header, span(shard), self.source, arrays.take(len(span(shard))))
                for header, arrays in zip(headers, buffers, strict=True)
            ]
            for _, (batch, targets) in group:
                for number, content in enumerate(filling):
                    content.add(batch, targets[number] if targets else None)
                progress(len(batch.indices))
            times = {"started": began, "seconds": time.time() - began, "batch_size": self.batch_size}
            yield shard, [content.finish(times) for content in filling]

    def reextract(self, indices: Sequence[int], views: Sequence[int], header: CacheHeader) -> Iterator[Reextracted]:
        """Records of the first teacher computed anew, one for each (index, view), for verification at level deep.

        Raises:
            DataError: an image can't be read any more.
        """
        wanted = iter(views)
        teacher = self.teachers[0]
        # Another version of the encoder writes the same view in other bytes.
        same_bytes = header.preprocessing == preprocessing(self.views, self.store)
        for batch in self._render_batches(indices, self.views):
            for row, index in enumerate(batch.indices):
                if index in batch.errors:
                    raise DataError(f"image {self.source.key(index)}: {batch.errors[index]}")
                view = next(wanted)
                out = teacher(
                    batch.pixels[row, view].unsqueeze(0).to(teacher.device), heads=header.attention == "heads"
                )
                rows = _attention(out, header.attention)
                top, left, height, width = (int(side) for side in batch.box[row, view])
                yield Reextracted(
                    tokens=out.tokens[0].float().cpu().numpy(),
                    attention=None if rows is None else rows[0].float().cpu().numpy(),
                    summary=None if out.summary is None else out.summary[0].float().cpu().numpy(),
                    box=(top, left, height, width),
                    hflip=bool(batch.hflip[row, view]),
                    source_hash=int(batch.source_hash[row]),
                    image=batch.images[row][view] if batch.images is not None and same_bytes else None,
                )

    def start(self, batch: RenderedViews, headers: Sequence[CacheHeader]) -> "PendingTargets":
        """Start all that the accelerator has to do for a batch; nothing here waits for it."""
        if not batch.readable:
            return PendingTargets(batch, [], None)
        outputs = self._forward(batch, heads=any(header.attention == "heads" for header in headers))
        targets = []
        for out, header in zip(outputs, headers, strict=True):
            attention = _attention(out, header.attention)
            kept = None if attention is None else attention.half()
            targets.append(store_targets(header, out.tokens, out.summary, kept))
        return PendingTargets(batch, *start_copies(targets))

    def _forward(self, batch: RenderedViews, heads: bool = False) -> list[TeacherOutput]:
        views = batch.readable_pixels().to(self.teachers[0].device, non_blocking=True)
        return run_teachers(self.teachers, views, heads)

    @property
    def _samples_per_batch(self) -> int:
        return max(1, self.batch_size // self.views.count)

    def _render_batches(self, indices: Iterable[int], views: ViewConfig) -> Iterator[RenderedViews]:
        return self.batches(_chunks(list(indices), max(1, self.batch_size // views.count)), views)

    def batches(self, chunks: Iterable[Sequence[int]], views: ViewConfig) -> Iterator[RenderedViews]:
        """Each chunk of samples with all of their views, rendered by the decode workers."""
        renderer = ViewRenderer(self.source, views, store_jpeg=self.store == "webdataset")
        return load(renderer, [[(0, index) for index in chunk] for chunk in chunks], self.workers)


@dataclass
class Summary:
    """What a run of extraction did."""

    images: int = 0
    shards: int = 0
    tombstones: dict[int, str] = field(default_factory=dict)

    def add(self, data: ShardData) -> None:
        self.shards += 1
        self.images += len(data.keys) - len(data.tombstones)
        self.tombstones |= data.tombstones


def check_lost(source: ImageSource, lost: Mapping[int, str], share: float) -> None:
    """Raise DataError when more than this share of the dataset can't be read; `lost`: sample index → why."""
    if len(lost) > share * len(source):
        index, reason = next(iter(lost.items()))
        raise DataError(
            f"{len(lost)} of {len(source)} images can't be read (the first: {source.key(index)}, {reason}): mend them "
            "and extract into a new folder (or, where no file changes its length, let verify-cache --repair extract "
            "them again), or raise max_tombstones to go on without them"
        )


def _one_ahead(started: Iterable[PendingTargets]) -> Iterator[tuple[RenderedViews, list[StoredTargets]]]:
    """Start the next batch before waiting for the last, so that an accelerator always has work queued."""
    last: PendingTargets | None = None
    for pending in started:
        if last is not None:
            yield last.wait()
        last = pending
    if last is not None:
        yield last.wait()


def _join(batches: Sequence[TeacherOutput]) -> TeacherOutput:
    """Tokens and summaries of several batches as of one."""
    summaries = [out.summary for out in batches if out.summary is not None]
    tokens = torch.cat([out.tokens for out in batches])
    return TeacherOutput(tokens, None, summary=torch.cat(summaries) if summaries else None)


def _attention(out: TeacherOutput, kind: str) -> Tensor | None:
    return {"mean": out.attention, "heads": out.attention_heads, "none": None}[kind]


def _chunks(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    return [indices[at : at + size] for at in range(0, len(indices), size)]
