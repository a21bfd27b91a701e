"""Batches by step: which samples, which views, which masks, all functions of (seed, epoch, index) alone.

A global batch is fixed by the config; each process takes its slice. So the stream of samples depends on neither the
number of processes nor of workers, and a run resumes by starting the sampler at its step.
"""

import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.cache import CacheReader, Record, hash_source
from pipeline.data.images import ImageSource, decode, decode_pixels
from pipeline.data.masks import Focus, draw_masks, gumbel_noise
from pipeline.data.order import EpochOrder
from pipeline.data.views import View, ViewConfig, draw_view, render, to_chw, view_of_epoch
from pipeline.errors import CacheError, DataError, PipelineError

Request = tuple[int, int]  # (epoch, sample index)
B_co = TypeVar("B_co", covariant=True)
B = TypeVar("B")


class IndexedDataset(Protocol[B_co]):
    """Makes one micro-batch of what a list of requests names."""

    def __getitems__(self, requests: list[Request]) -> B_co: ...


@dataclass(frozen=True)
class StepSampler:
    """The requests of one process, micro-batch by micro-batch, from `start_step` to `total_steps`."""

    order: EpochOrder
    images_per_step: int  # over all processes
    accum_iter: int
    rank: int
    processes: int
    start_step: int
    total_steps: int

    def __iter__(self) -> Iterator[list[Request]]:
        steps_per_epoch = len(self.order) // self.images_per_step
        share = self.images_per_step // self.processes
        for step in range(self.start_step, self.total_steps):
            epoch, place = divmod(step, steps_per_epoch)
            first = place * self.images_per_step + self.rank * share
            mine = self.order.take(epoch, first, first + share)
            for micro in np.split(mine, self.accum_iter):
                yield [(epoch, int(index)) for index in micro]


def load(dataset: IndexedDataset[B], requests: Any, workers: int) -> Iterator[B]:
    """Run the dataset over the requests in `workers` processes (0: in this one), in order.

    Raises:
        PipelineError: whatever a worker met, as itself rather than as a traceback in a string.
    """
    loader: DataLoader[Any] = DataLoader(
        _Guarded(dataset),
        batch_sampler=requests,
        num_workers=workers,
        collate_fn=_identity,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
        worker_init_fn=_start_worker,
    )
    for batch in loader:
        if isinstance(batch, PipelineError):
            raise batch
        yield batch


class _Guarded(Dataset[Any], Generic[B]):
    def __init__(self, dataset: IndexedDataset[B]) -> None:
        self._dataset = dataset

    def __getitems__(self, requests: list[Request]) -> B | PipelineError:
        try:
            return self._dataset.__getitems__(requests)
        except PipelineError as error:
            return error


def _identity(batch: B) -> B:
    return batch


def _start_worker(_number: int) -> None:
    """One thread each, and deaf to the signals that a terminal or a scheduler sends to the whole process group.

    The training process answers those, and wants its batches until it has saved; workers leave when it tells them to.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@dataclass
class PretrainBatch:
    """One micro-batch of masked views.

    Attributes:
        images: uint8 [B, 3, S, S], as rendered: the student's normalisation happens on the device.
        ids_keep: int64 [B, K], visible patches, ascending; None where a live teacher's attention will choose them.
        gumbel: float64 [B, L], what that choice adds to the logarithm of its attention (see `select_visible`).
        targets: teacher → (values [B, R, D] as stored, scale float16 [B, R] or None); the R rows are the visible, the
            masked (ascending) or all patches, as the objective declares.
        indices: int64 [B], sample indices.
    """

    images: Tensor
    ids_keep: Tensor | None
    targets: dict[str, tuple[Tensor, Tensor | None]]
    indices: Tensor
    gumbel: Tensor | None = None

    def to(self, device: torch.device) -> "PretrainBatch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PretrainBatch":
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> "PretrainBatch":
        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else move(tensor)

        return PretrainBatch(
            move(self.images),
            moved(self.ids_keep),
            {name: (move(values), moved(scale)) for name, (values, scale) in self.targets.items()},
            self.indices,
            moved(self.gumbel),
        )


class PretrainDataset:
    """Masked views with their cached targets; without a cache, masked views alone.

    Args:
        source: the images; None when the first cache stores the rendered views itself.
        caches: teacher → reader, all over the same samples and views.
        views: how to draw views without a cache.
        patches, keep: patches of a view, and how many stay visible.
        focus: how visible patches are chosen; by the first cache's attention.
        rows: which target rows the objective asks for: "visible", "masked", "all" or "none".
        masks_per_sample: masks trained of each view that is read.
        online: a live teacher on the device will say what to focus by; masks that need that are left to it.
        seed: of views without a cache, and of masks.
    """

    def __init__(
        self,
        source: ImageSource | None,
        caches: Mapping[str, CacheReader],
        views: ViewConfig,
        *,
        patches: int,
        keep: int,
        focus: Focus,
        rows: str,
        masks_per_sample: int,
        seed: int,
        online: bool = False,
    ) -> None:
        self.source, self.caches, self.views = source, dict(caches), views
        self.patches, self.keep, self.focus, self.rows = patches, keep, focus, rows
        self.masks_per_sample, self.seed = masks_per_sample, seed
        self.defers_masks = online and focus != "random"

    def __getitems__(self, requests: list[Request]) -> PretrainBatch:
        repeats, size = self.masks_per_sample, self.views.image_size
        pixels = np.empty((len(requests) * repeats, size, size, 3), np.uint8)
        masks, gumbel = [], []
        targets: dict[str, list[tuple[NDArray[Any], NDArray[Any] | None]]] = {name: [] for name in self.caches}
        for row, (epoch, index) in enumerate(requests):
            view = view_of_epoch(index, epoch, self.views.count)
            records = {name: cache.read(index, view) for name, cache in self.caches.items()}
            self._show(index, view, list(records.values()), pixels[row * repeats])
            pixels[row * repeats + 1 : (row + 1) * repeats] = pixels[row * repeats]
            if self.defers_masks:
                if self.focus == "sampled":
                    gumbel.append(gumbel_noise(self.patches, self.seed, epoch, index, repeats))
                continue
            for ids in self._draw(epoch, index, records):
                masks.append(ids)
                for name, record in records.items():
                    if self.rows != "none":
                        targets[name].append(_rows_of(record, ids, self.rows))
        return PretrainBatch(
            to_chw(pixels),
            torch.from_numpy(np.stack(masks)) if masks else None,
            {name: _stack(rows) for name, rows in targets.items() if rows},
            torch.tensor([index for _, index in requests for _ in range(repeats)]),
            torch.from_numpy(np.concatenate(gumbel)) if gumbel else None,
        )

    def _draw(self, epoch: int, index: int, records: Mapping[str, Record]) -> NDArray[np.int64]:
        """`ids_keep` [masks_per_sample, K], focused by the first cache's attention."""
        attention = next((record.attention for record in records.values()), None)
        if attention is not None and attention.ndim == 2:  # a row for each head
            attention = attention.astype(np.float32).mean(0)
        return draw_masks(
            attention, self.patches, self.keep, self.focus, self.seed, epoch, index, self.masks_per_sample
        )

    def _show(self, index: int, view: int, records: list[Record], out: NDArray[np.uint8]) -> None:
        """The view that the teacher saw, byte for byte, into `out` [S, S, 3]."""
        if records and records[0].image is not None:
            _agree(records)
            decode_pixels(records[0].image, out)
            return
        if self.source is None:
            raise CacheError("this cache holds no images: give data.path")
        data = self.source.read(index)
        try:
            image = decode(data)
        except DataError as error:
            raise DataError(f"image {self.source.key(index)}: {error}; repair it or take it away") from error
        if records and records[0].source_hash != hash_source(data):
            raise CacheError(
                f"image {records[0].key} is not the one that the cache was made of: restore it, or extract again"
            )
        shown = _agree(records) if records else draw_view(self.views, index, view, image.height, image.width)
        out[...] = np.asarray(render(image, shown, self.views.image_size))


def _agree(records: list[Record]) -> View:
    """The one view of one image that all teachers saw."""
    first = records[0]
    for record in records[1:]:
        same_view = record.hflip == first.hflip and (record.box == first.box).all()
        if not same_view or record.source_hash != first.source_hash:
            raise CacheError(f"the caches show different views of {first.key}: extract them from the same images")
    top, left, height, width = (int(side) for side in first.box)
    return View((top, left, height, width), first.hflip)


def _rows_of(record: Record, ids: NDArray[np.int64], rows: str) -> tuple[NDArray[Any], NDArray[Any] | None]:
    if rows == "all":
        return record.tokens, record.scale
    if rows == "masked":
        ids = np.setdiff1d(np.arange(len(record.tokens)), ids, assume_unique=True)
    return record.tokens[ids], None if record.scale is None else record.scale[ids]


def _stack(rows: list[tuple[NDArray[Any], NDArray[Any] | None]]) -> tuple[Tensor, Tensor | None]:
    values = torch.from_numpy(np.stack([value for value, _ in rows]))
    scales = [scale for _, scale in rows if scale is not None]
    return values, torch.from_numpy(np.stack(scales)) if scales else None
