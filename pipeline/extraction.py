"""Stage 1's core: images → views → teacher → quantise → shards. What extraction, repair and deep checks share.

Decoding runs in worker processes, the teacher in this one, writing in a thread. At most two shards are in memory: the
one being filled and the one being written; a slow disk slows extraction down and fills nothing.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import features
from torch import Tensor

from pipeline.cache import (
    CacheHeader,
    CacheWriter,
    Fidelity,
    FidelityFigures,
    Quantiser,
    Reextracted,
    ShardData,
    hash_source,
)
from pipeline.data.images import ImageSource, decode
from pipeline.data.loader import Request, load
from pipeline.data.views import ViewConfig, draw_view, encode_jpeg, render, to_chw
from pipeline.errors import DataError, TeacherError
from pipeline.teachers import Teacher

JPEG_QUALITY = 95


@dataclass
class RenderedViews:
    """A few samples, all their views.

    Attributes:
        indices: the samples; those in `errors` have zeros everywhere else.
        pixels: uint8 [n, V, 3, S, S], what teacher and student see.
        box: int32 [n, V, 4]; hflip: uint8 [n, V]; source_hash: uint64 [n].
        images: [n][V] JPEG bytes, for the webdataset store alone.
    """

    indices: list[int]
    pixels: Tensor
    box: NDArray[np.int32]
    hflip: NDArray[np.uint8]
    source_hash: NDArray[np.uint64]
    images: list[list[bytes]] | None
    errors: dict[int, str]

    @property
    def readable(self) -> list[int]:
        """Rows of the samples that could be decoded."""
        return [row for row, index in enumerate(self.indices) if index not in self.errors]


class ViewRenderer:
    """Draws and renders all views of a sample from one decoding."""

    def __init__(self, source: ImageSource, views: ViewConfig, store_jpeg: bool) -> None:
        self.source, self.views, self.store_jpeg = source, views, store_jpeg

    def __getitems__(self, requests: list[Request]) -> RenderedViews:
        n, v, size = len(requests), self.views.count, self.views.image_size
        out = RenderedViews(
            indices=[index for _, index in requests],
            pixels=torch.zeros(n, v, 3, size, size, dtype=torch.uint8),
            box=np.zeros((n, v, 4), np.int32),
            hflip=np.zeros((n, v), np.uint8),
            source_hash=np.zeros(n, np.uint64),
            images=[[] for _ in range(n)] if self.store_jpeg else None,
            errors={},
        )
        for row, index in enumerate(out.indices):
            try:
                self._render(out, row, index)
            except DataError as error:
                out.errors[index] = str(error)
        return out

    def _render(self, out: RenderedViews, row: int, index: int) -> None:
        data = self.source.read(index)
        image = decode(data)
        out.source_hash[row] = hash_source(data)
        for number in range(self.views.count):
            view = draw_view(self.views, index, number, image.height, image.width)
            pixels = render(image, view, self.views.image_size)
            if out.images is not None:
                # The trainer will decode these bytes, so the teacher must see what they decode to.
                out.images[row].append(encode_jpeg(pixels, JPEG_QUALITY))
                pixels = decode(out.images[row][-1])
            out.pixels[row, number] = torch.from_numpy(to_chw(pixels))
            out.box[row, number], out.hflip[row, number] = view.box, view.hflip


@dataclass
class Extractor:
    """One teacher over one dataset, for any of its shards.

    Args:
        batch_size: views per forward pass; never across shards, so a shard's bytes depend on nothing outside it.
        workers: decoding processes.
    """

    source: ImageSource
    views: ViewConfig
    teacher: Teacher
    batch_size: int
    workers: int
    store: str

    def describe(self, attention: str, samples_per_shard: int, quantiser: dict[str, Any]) -> CacheHeader:
        """The header of the cache that this extractor would write."""
        return CacheHeader.model_validate(
            {
                "store": self.store,
                "dataset": {
                    "source": self.source.root,
                    "kind": self.source.kind,
                    "count": len(self.source),
                    "digest": self.source.digest(),
                },
                "teacher": self.teacher.identity(),
                "preprocessing": preprocessing(self.views.image_size, self.store),
                "views": self.views.model_dump(mode="json"),
                "quantiser": quantiser,
                "attention": attention if self.teacher.has_attention else "none",
                "heads": self.teacher.identity()["num_heads"] if attention == "heads" else 0,
                "samples_per_shard": min(
                    samples_per_shard, len(self.source)
                ),  # a zarr chunk is padded to its full size
            }
        )

    def calibrate(self, name: str, samples: int) -> Quantiser:
        """Channel statistics of the first readable samples' view 0."""
        if name != "int8":
            return Quantiser(name)
        views = self.views.model_copy(update={"count": 1})
        tokens = [
            self.teacher(batch.pixels[batch.readable, 0].to(self._device)).tokens.cpu()
            for batch in self._render_batches(range(min(samples, len(self.source))), views)
            if batch.readable
        ]
        if not tokens:
            raise DataError(f"none of the first {samples} images can be decoded: check data.path")
        return Quantiser.calibrate(name, torch.cat(tokens))

    def run(
        self,
        writer: CacheWriter,
        shards: Sequence[int],
        bounds: Mapping[str, float],
        progress: Callable[[int], None] = lambda images: None,
    ) -> "Summary":
        """Extract and write the shards; each is committed as soon as it is whole.

        Raises:
            CacheError: a shard lost more in quantisation than `bounds` (of `FidelityFigures.check`) allow.
        """
        summary = Summary()
        with ThreadPoolExecutor(max_workers=1) as pool:
            writing: Future[None] | None = None
            for shard, data in self.shards(writer.header, shards, progress):
                summary.add(data)
                FidelityFigures.model_validate(data.fidelity).check(**bounds)
                if writing is not None:
                    writing.result()
                writer.clean_partial(shard)
                writing = pool.submit(writer.write_shard, shard, data)
            if writing is not None:
                writing.result()
        return summary

    def shards(
        self, header: CacheHeader, shards: Sequence[int], progress: Callable[[int], None] = lambda images: None
    ) -> Iterator[tuple[int, ShardData]]:
        """Each shard's content, whole, in the order asked for."""
        per_batch = max(1, self.batch_size // header.views)
        requests = [chunk for shard in shards for chunk in _chunks(header.shard_range(shard), per_batch)]
        batches = self._load(requests, self.views)
        for shard in shards:
            began = time.time()
            filling = _Filling(header, header.shard_range(shard), self.source)
            for batch in (next(batches) for _ in _chunks(header.shard_range(shard), per_batch)):
                filling.add(batch, self._teach(batch, header, filling.fidelity))
                progress(len(batch.indices))
            yield shard, filling.finish({"started": began, "seconds": time.time() - began})

    def reextract(self, indices: Sequence[int], views: Sequence[int], attention: str) -> Iterator[Reextracted]:
        """Records computed anew, one for each (index, view), for the deep level of verification.

        Raises:
            DataError: an image can't be read any more.
        """
        wanted = iter(views)
        for batch in self._render_batches(indices, self.views):
            for row, index in enumerate(batch.indices):
                if index in batch.errors:
                    raise DataError(f"image {self.source.key(index)}: {batch.errors[index]}")
                view = next(wanted)
                out = self.teacher(batch.pixels[row, view].unsqueeze(0).to(self._device), heads=attention == "heads")
                rows = {"mean": out.attention, "heads": out.attention_heads, "none": None}[attention]
                top, left, height, width = (int(side) for side in batch.box[row, view])
                yield Reextracted(
                    tokens=out.tokens[0].float().cpu().numpy(),
                    attention=None if rows is None else rows[0].float().cpu().numpy(),
                    box=(top, left, height, width),
                    hflip=bool(batch.hflip[row, view]),
                    source_hash=int(batch.source_hash[row]),
                    image=batch.images[row][view] if batch.images is not None else None,
                )

    def _teach(self, batch: RenderedViews, header: CacheHeader, fidelity: Fidelity) -> "_Targets | None":
        """What the cache stores of the readable samples of a batch, on the host; None if there are none."""
        rows = batch.readable
        if not rows:
            return None
        views = batch.pixels[rows].flatten(0, 1).to(self._device, non_blocking=True)
        out = self.teacher(views, heads=header.attention == "heads")
        if not torch.isfinite(out.tokens).all():
            raise TeacherError(
                f"teacher {self.teacher.name} gave non-finite tokens near {self.source.key(batch.indices[0])}: "
                "use precision=fp32, or other weights"
            )
        stored, scale = header.quantiser.quantise(out.tokens)
        fidelity.update(out.tokens, header.quantiser.dequantise(stored, scale))
        attention = {"mean": out.attention, "heads": out.attention_heads, "none": None}[header.attention]
        shape = (len(rows), header.views)
        return _Targets(
            _to_host(stored, shape),
            _to_host(scale, shape),
            _to_host(None if attention is None else attention.half(), shape),
        )

    def _render_batches(self, indices: Iterable[int], views: ViewConfig) -> Iterator[RenderedViews]:
        return self._load(_chunks(list(indices), max(1, self.batch_size // views.count)), views)

    def _load(self, chunks: Iterable[Sequence[int]], views: ViewConfig) -> Iterator[RenderedViews]:
        renderer = ViewRenderer(self.source, views, store_jpeg=self.store == "webdataset")
        return load(renderer, [[(0, index) for index in chunk] for chunk in chunks], self.workers)

    @property
    def _device(self) -> torch.device:
        return self.teacher.device


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


def preprocessing(image_size: int, store: str) -> dict[str, Any]:
    """What turns encoded bytes into pixels; part of the fingerprint, since another version may give other pixels."""
    return {
        "decoder": f"pillow {PIL.__version__}",
        "libjpeg": str(features.version_feature("libjpeg_turbo") or features.version("jpg")),
        "orientation": "exif",
        "interpolation": "bicubic",
        "image_size": image_size,
        "jpeg": f"quality {JPEG_QUALITY}, 4:4:4" if store == "webdataset" else None,
    }


class _Targets(NamedTuple):
    """Stored tokens [n, V, L, D], scale [n, V, L] and attention [n, V, (H,) L] of n readable samples."""

    tokens: NDArray[Any]
    scale: NDArray[np.float16] | None
    attention: NDArray[np.float16] | None


def _to_host(values: Tensor | None, shape: tuple[int, int]) -> Any:
    return None if values is None else values.cpu().unflatten(0, shape).numpy()


class _Filling:
    """The arrays of one shard while its batches come in."""

    def __init__(self, header: CacheHeader, samples: range, source: ImageSource) -> None:
        n, v = len(samples), header.views
        quantiser = header.quantiser
        self.fidelity = Fidelity()
        self.first = samples.start
        shape = header.attention_shape
        self.data = ShardData(
            tokens=np.zeros((n, v, header.tokens, header.dim), quantiser.dtype),
            scale=np.zeros((n, v, header.tokens), np.float16) if quantiser.has_scale else None,
            attention=np.zeros((n, v, *shape), np.float16) if shape else None,
            box=np.zeros((n, v, 4), np.int32),
            hflip=np.zeros((n, v), np.uint8),
            source_hash=np.zeros(n, np.uint64),
            keys=[source.key(index) for index in samples],
            images=[[] for _ in samples] if header.store == "webdataset" else None,
            tombstones={},
            fidelity={},
            times={},
        )

    def add(self, batch: RenderedViews, targets: "_Targets | None") -> None:
        data = self.data
        data.tombstones |= batch.errors
        if targets is None:
            return
        rows = batch.readable
        at = [batch.indices[row] - self.first for row in rows]
        data.tokens[at] = targets.tokens
        if data.scale is not None:
            data.scale[at] = targets.scale
        if data.attention is not None:
            data.attention[at] = targets.attention
        data.box[at], data.hflip[at] = batch.box[rows], batch.hflip[rows]
        data.source_hash[at] = batch.source_hash[rows]
        if data.images is not None and batch.images is not None:
            for place, row in zip(at, rows, strict=True):
                data.images[place] = batch.images[row]

    def finish(self, times: dict[str, float]) -> ShardData:
        self.data.fidelity = self.fidelity.to_json()
        self.data.times = times
        return self.data


def _chunks(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    return [indices[at : at + size] for at in range(0, len(indices), size)]
