"""A pre-training batch: masked views, and the target rows that their teachers' caches hold. Made in the workers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.assembly.resizing import Grid, resize_attention, resize_tokens
from pipeline.cache import CacheHeader, CacheReader, Record
from pipeline.configs.data import ViewConfig
from pipeline.data.decoding import decode_pixels
from pipeline.data.images import ImageSource
from pipeline.data.loader import Request
from pipeline.data.masks import MaskSampler
from pipeline.data.slots import Empty
from pipeline.data.views import Picture, View, to_chw, view_of_epoch
from pipeline.errors import CacheError, DataError
from pipeline.files import hash_source
from pipeline.models.masking import complement, gather_tokens


@dataclass
class PretrainBatch:
    """One micro-batch of masked views.

    Attributes:
        images: uint8 [B, 3, S, S], as rendered: the student's normalisation happens on the device.
        ids_keep: int64 [B, K], visible patches, ascending; None where a live teacher's attention will choose them.
        gumbel: float64 [B, L], what that choice adds to the logarithm of its attention (see `select_visible`); a row
            for each image where its masks share out one draw.
        targets: teacher → (values [B, R, D] as stored, for int4 [B, R, D/2], for codes [B, R, 1]; scale float16 [B, R]
            or None); the R rows are the visible or the predicted patches (ascending), as the objective declares. Of a
            teacher on another grid than the student's they are all its tokens, [B / masks, L, ...], since they have to
            be resized first.
        summaries: teacher → (class token [B / masks, 1, D] as stored, scale float16 [B / masks, 1] or None), of each
            sample once; empty unless they are asked for.
        indices: int64 [B], sample indices.
        ids_predict: int64 [B, P], masked patches that are predicted, ascending; None for all of them.
        lots: float64 [B, L], what draws `ids_predict` where the masks are chosen on the device.
    """

    images: Tensor
    ids_keep: Tensor | None
    targets: dict[str, tuple[Tensor, Tensor | None]]
    indices: Tensor
    gumbel: Tensor | None = None
    ids_predict: Tensor | None = None
    lots: Tensor | None = None
    summaries: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def to(self, device: torch.device) -> "PretrainBatch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, move: Callable[[Tensor], Tensor]) -> "PretrainBatch":
        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else move(tensor)

        return PretrainBatch(
            move(self.images),
            moved(self.ids_keep),
            {name: (move(values), moved(scale)) for name, (values, scale) in self.targets.items()},
            self.indices,
            moved(self.gumbel),
            moved(self.ids_predict),
            moved(self.lots),
            {name: (move(values), moved(scale)) for name, (values, scale) in self.summaries.items()},
        )


class PretrainDataset:
    """Masked views with their cached targets; without a cache, masked views alone.

    Args:
        source: the images; None when the first cache stores the rendered views itself.
        caches: teacher → reader, all over the same samples and views.
        views: how to draw views without a cache.
        masks: by the attention of the first cache that has one.
        rows: which target rows the objective asks for: "visible", "masked" or "none".
        online: a live teacher on the device will say what to focus by; masks that need that are left to it.
        grid: the student's; None where every teacher has it.
        summaries: whether the teachers' class tokens are wanted too; every cache must have them.
    """

    def __init__(
        self,
        source: ImageSource | None,
        caches: Mapping[str, CacheReader],
        views: ViewConfig,
        masks: MaskSampler,
        rows: str,
        online: bool = False,
        grid: Grid | None = None,
        summaries: bool = False,
    ) -> None:
        self.source, self.caches, self.views, self.masks, self.rows = source, dict(caches), views, masks, rows
        self.grid, self.summaries = grid, summaries
        self.resized = {name for name, cache in caches.items() if grid and cache.header.grid != grid}
        self.defers_masks = online and masks.focus != "random"

    def __getitems__(self, requests: list[Request], empty: Empty = np.empty) -> PretrainBatch:
        count, size = self.masks.count, self.views.image_size
        views = [view_of_epoch(index, epoch, self.views.count) for epoch, index in requests]
        noise = self.masks.noise(requests)
        lots = None if self.masks.predict is None else self.masks.lots(requests)
        records, ids, rows = self._read(requests, views, noise, lots, empty)
        pixels = empty((len(requests), count, size, size, 3), np.uint8)
        batch = PretrainBatch(
            to_chw(pixels.reshape(-1, size, size, 3)),
            _rows(ids.keep),
            {name: target_rows.tensors() for name, target_rows in rows.targets.items()},
            torch.from_numpy(np.repeat([index for _, index in requests], count)),
            ids_predict=_rows(ids.predict),
            summaries={name: summary_rows.tensors() for name, summary_rows in rows.summaries.items()},
        )
        if self.defers_masks:
            draws = noise[:, :1] if self.masks.shares_a_draw else noise
            batch.gumbel = _rows(draws if self.masks.focus == "sampled" else None)
            batch.lots = _rows(lots)
        # Pixels after all records, not in between: the two push each other's code and data out of the CPU's cache.
        for row, ((_, index), view) in enumerate(zip(requests, views, strict=True)):
            self._show(index, view, records[row], pixels[row, 0])
        pixels[:, 1:] = pixels[:, :1]
        return batch

    def rows_of_maps(
        self, tokens: Mapping[str, Tensor], grids: Mapping[str, Grid], ids_keep: Tensor, ids_predict: Tensor | None
    ) -> dict[str, Tensor]:
        """The rows [B, R, D] that the objective asks for, of teachers' whole maps [B / masks, L, D] on their grids."""
        ids = ids_keep
        if self.rows != "visible":
            ids = complement(ids_keep, self.masks.patches) if ids_predict is None else ids_predict
        maps = {name: resize_tokens(values, grids[name], self.grid or grids[name]) for name, values in tokens.items()}
        return {name: gather_tokens(repeat_for_masks(values, self.masks.count), ids) for name, values in maps.items()}

    def _read(
        self,
        requests: list[Request],
        views: list[int],
        noise: NDArray[np.float64],
        lots: NDArray[np.float64] | None,
        empty: Empty,
    ) -> tuple[list[list[Record]], "_Ids", "_Rows"]:
        """Each sample's records, its patches unless they are deferred, target rows and summaries."""
        masks, shape = self.masks, (len(requests), self.masks.count)
        ids = _Ids(
            None if self.defers_masks else np.empty((*shape, masks.keep), np.int64),
            None if self.defers_masks or masks.predict is None else np.empty((*shape, masks.predict), np.int64),
        )
        wanted = {} if self.defers_masks or self.rows == "none" else self.caches
        targets = {name: self._target_rows(name, len(requests), empty) for name in wanted}
        summaries = {
            name: _TargetRows(cache.header, (len(requests), 1, 1), empty)
            for name, cache in (self.caches.items() if self.summaries else ())
        }
        records_of_samples: list[list[Record]] = []
        for cache in self.caches.values():
            cache.expect((index, view) for (_, index), view in zip(requests, views, strict=True))
        for row, ((_, index), view) in enumerate(zip(requests, views, strict=True)):
            # Arrays of a record last until the next one is read: what is wanted of them is taken at once.
            records = {name: cache.read(index, view, keep=False) for name, cache in self.caches.items()}
            records_of_samples.append(list(records.values()))
            for name, summary_rows in summaries.items():
                summary_rows.take_summary(row, records[name])
            if ids.keep is None:
                continue
            ids.keep[row] = masks.ids_keep(self._attention_of(records_of_samples[-1]), noise[row])
            if ids.predict is not None and lots is not None:
                ids.predict[row] = masks.ids_predict(ids.keep[row], lots[row])
            if targets:
                wanted_ids = self._target_ids(ids, row)
                for name, target_rows in targets.items():
                    target_rows.take(row, records[name], self._all_ids(name) if name in self.resized else wanted_ids)
        return records_of_samples, ids, _Rows(targets, summaries)

    def _target_rows(self, name: str, samples: int, empty: Empty) -> "_TargetRows":
        header, masks = self.caches[name].header, self.masks
        if name in self.resized:
            return _TargetRows(header, (samples, *self._all_ids(name).shape), empty)
        hidden = masks.patches - masks.keep if masks.predict is None else masks.predict
        return _TargetRows(header, (samples, masks.count, masks.keep if self.rows == "visible" else hidden), empty)

    def _target_ids(self, ids: "_Ids", row: int) -> NDArray[np.int64]:
        """The patches [M, R] of a sample whose target rows the objective asks for, ascending."""
        assert ids.keep is not None
        chosen: NDArray[np.int64] = ids.keep[row]
        if self.rows == "visible":
            return chosen
        if ids.predict is not None:
            chosen = ids.predict[row]
            return chosen
        patches = np.arange(self.masks.patches)
        return np.stack([np.setdiff1d(patches, visible, assume_unique=True) for visible in chosen])

    def _all_ids(self, name: str) -> NDArray[np.int64]:
        """All patches of a teacher [1, L]: once for all masks of a sample."""
        return np.arange(self.caches[name].header.tokens)[None]

    def _attention_of(self, records: list[Record]) -> NDArray[Any] | None:
        """The attention [L] on the student's grid of the first record that has one; None where none has."""
        for record, (teacher, cache) in zip(records, self.caches.items(), strict=True):
            attention: NDArray[Any] | None = record.attention
            if attention is None:
                continue
            if attention.ndim == 2:  # a row for each head
                attention = attention.astype(np.float32).mean(0)
            if self.grid is None or teacher not in self.resized:
                return attention
            return resize_attention(torch.from_numpy(attention).unsqueeze(0), cache.header.grid, self.grid)[0].numpy()
        return None

    def _show(self, index: int, view: int, records: list[Record], out: NDArray[np.uint8]) -> None:
        """The view that the teacher saw, byte for byte, into `out` [S, S, 3]."""
        _agree(records)
        if records and records[0].image is not None:
            decode_pixels(records[0].image, out)
            return
        if self.source is None:
            raise CacheError("this cache holds no images: give data.path")
        data = self.source.read(index)
        try:
            picture = Picture(data, self.views)
        except DataError as error:
            raise DataError(f"image {self.source.key(index)}: {error}; repair it or take it away") from error
        if records and records[0].source_hash != hash_source(data):
            raise CacheError(
                f"image {records[0].key} is not the one that the cache was made of: restore it, or extract again"
            )
        picture.show(_view_of(records[0]) if records else picture.draw(index, view), out)


class _Ids(NamedTuple):
    """Patches of a batch's masks, int64 [samples, M, K or P]; None where the device chooses them, or all are meant."""

    keep: NDArray[np.int64] | None
    predict: NDArray[np.int64] | None


class _Rows(NamedTuple):
    """What a batch takes of the caches, by teacher."""

    targets: dict[str, "_TargetRows"]
    summaries: dict[str, "_TargetRows"]


def _rows(values: NDArray[Any] | None) -> Tensor | None:
    """[samples, masks, N] as a tensor [B, N]."""
    return None if values is None else torch.from_numpy(values.reshape(-1, values.shape[-1]))


def repeat_for_masks(values: Tensor, masks: int) -> Tensor:
    """Each row [B / masks, ...] once for each mask of its sample: [B, ...]."""
    return values.repeat_interleave(masks, 0) if masks > 1 else values


def _agree(records: list[Record]) -> None:
    """CacheError unless all teachers saw the same view of the same image."""
    for record in records[1:]:
        first = records[0]
        same_view = record.hflip == first.hflip and (record.box == first.box).all()
        if not same_view or record.source_hash != first.source_hash:
            raise CacheError(f"the caches show different views of {first.key}: extract them from the same images")


def _view_of(record: Record) -> View:
    top, left, height, width = record.box.tolist()
    return View((top, left, height, width), record.hflip)


class _TargetRows:
    """The target rows of a batch, each record's taken where they are handed over.

    Args:
        header: of the cache that the records come from.
        shape: (samples, masks of each, rows of each mask).
    """

    def __init__(self, header: CacheHeader, shape: tuple[int, int, int], empty: Empty) -> None:
        self._values = empty((*shape, header.stored_dim), header.quantiser.dtype)
        self._scales = np.empty(shape, np.float16) if header.quantiser.has_scale else None

    def take(self, row: int, record: Record, ids: NDArray[np.int64]) -> None:
        """Rows `ids` [masks, R] of a record become those of sample `row`."""
        # Without a mode numpy takes into a buffer first, so that a wrong id leaves `out` as it was; ids are ours.
        record.tokens.take(ids, 0, out=self._values[row], mode="clip")
        if self._scales is not None:
            assert record.scale is not None
            record.scale.take(ids, out=self._scales[row], mode="clip")

    def take_summary(self, row: int, record: Record) -> None:
        """The class token of a record becomes the one row of sample `row`."""
        self._values[row] = record.summary
        if self._scales is not None:
            self._scales[row] = record.summary_scale

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """Values [samples × masks, R, D] and scales [samples × masks, R]."""
        scales = None if self._scales is None else torch.from_numpy(self._scales).flatten(0, 1)
        return torch.from_numpy(self._values).flatten(0, 1), scales
