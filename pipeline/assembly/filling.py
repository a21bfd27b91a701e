"""What an extraction has in its hands: targets on their way from the accelerator, and the shard that they fill."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.cache import CacheHeader, Fidelity, ShardArrays, ShardData
from pipeline.data.images import ImageSource
from pipeline.data.rendering import RenderedViews
from pipeline.errors import TeacherError


class StoredTargets(NamedTuple):
    """What one cache stores of the m views of a batch, and how faithful it is."""

    tokens: Tensor  # [m, R, D, D/2 or 1] as stored
    scale: Tensor | None  # [m, R] fp16
    attention: Tensor | None  # [m, (H,) L] fp16
    fidelity: Fidelity
    summary_fidelity: Fidelity  # of nothing where the cache keeps no summary

    def map(self, move: Callable[[Tensor], Tensor]) -> "StoredTargets":
        tokens, scale, attention, fidelity, of_summary = self
        moved_scale = None if scale is None else move(scale)
        moved_attention = None if attention is None else move(attention)
        return StoredTargets(move(tokens), moved_scale, moved_attention, fidelity.map(move), of_summary.map(move))


def store_targets(
    header: CacheHeader, tokens: Tensor, summary: Tensor | None, attention: Tensor | None
) -> StoredTargets:
    """Quantise tokens [m, L, D], and in front of them the summary [m, 1, D] where the cache keeps it."""
    stored, scale = header.quantiser.quantise(tokens)
    fidelity, of_summary = Fidelity(), Fidelity()
    fidelity.update(tokens, header.quantiser.dequantise(stored, scale))
    if header.summary is not None:
        assert summary is not None
        first, first_scale = header.summary_quantiser.quantise(summary)
        of_summary.update(summary, header.summary_quantiser.dequantise(first, first_scale))
        stored = torch.cat([first, stored], 1)
        if scale is not None and first_scale is not None:
            scale = torch.cat([first_scale, scale], 1)
    return StoredTargets(stored, scale, attention, fidelity, of_summary)


class PendingTargets(NamedTuple):
    """A batch whose targets are on their way to the host."""

    batch: RenderedViews
    targets: list[StoredTargets]  # one a cache; none if no sample of the batch could be decoded
    arrived: torch.cuda.Event | None  # None: they are there

    def wait(self) -> tuple[RenderedViews, list[StoredTargets]]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.batch, self.targets


def start_copies(targets: list[StoredTargets]) -> tuple[list[StoredTargets], "torch.cuda.Event | None"]:
    """Copy to pinned host memory on a stream of its own, so that neither host nor forward waits for the copy."""
    device = targets[0].tokens.device
    if device.type != "cuda":
        return targets, None
    stream = _copy_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))

    def start(values: Tensor) -> Tensor:
        values.record_stream(stream)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return host.copy_(values, non_blocking=True)

    with torch.cuda.stream(stream):
        copies = [target.map(start) for target in targets]
        return copies, stream.record_event()


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class ShardInProgress:
    """The arrays of one shard of one cache while its batches come in; rows of tombstones stay as they were."""

    def __init__(self, header: CacheHeader, samples: range, source: ImageSource, arrays: ShardArrays) -> None:
        n, v = len(samples), header.views
        self.fidelity, self.summary_fidelity = Fidelity(), Fidelity()
        self.header, self.first, self.teacher = header, samples.start, header.teacher["name"]
        self.data = ShardData(
            tokens=arrays.tokens,
            scale=arrays.scale,
            attention=arrays.attention,
            box=np.zeros((n, v, 4), np.int32),
            hflip=np.zeros((n, v), np.uint8),
            source_hash=np.zeros(n, np.uint64),
            keys=[source.key(index) for index in samples],
            images=[[] for _ in samples] if header.store == "webdataset" else None,
            tombstones={},
            fidelity={},
            times={},
        )

    def add(self, batch: RenderedViews, targets: StoredTargets | None) -> None:
        """Put the readable samples of a batch where they belong, and record the others.

        Raises:
            TeacherError: the teacher gave tokens that are not finite.
        """
        data, rows = self.data, batch.readable
        data.tombstones |= batch.errors
        if targets is None:
            return
        at = [batch.indices[row] - self.first for row in rows]
        data.tokens[at] = self._checked(targets.tokens, batch)
        if data.scale is not None:
            data.scale[at] = self._checked(targets.scale, batch)
        if data.attention is not None:
            data.attention[at] = self._checked(targets.attention, batch)
        self.fidelity.merge(targets.fidelity)
        self.summary_fidelity.merge(targets.summary_fidelity)
        data.box[at], data.hflip[at] = batch.box[rows], batch.hflip[rows]
        data.source_hash[at] = batch.source_hash[rows]
        if data.images is not None and batch.images is not None:
            for place, row in zip(at, rows, strict=True):
                data.images[place] = batch.images[row]

    def finish(self, times: dict[str, Any]) -> ShardData:
        figures = self.fidelity.figures(self.header.quantiser.std)
        if self.header.summary is not None:
            of_summary = self.summary_fidelity.figures(self.header.summary_quantiser.std)
            figures = figures.model_copy(update={"summary": of_summary})
        self.data.fidelity, self.data.times = figures.model_dump(exclude_none=True), times
        return self.data

    def _checked(self, values: Tensor | None, batch: RenderedViews) -> NDArray[Any]:
        """Values [m, ...] as [n, V, ...], all finite; asked here, on the host, where an accelerator need not wait."""
        assert values is not None
        array: NDArray[Any] = values.unflatten(0, (len(batch.readable), -1)).numpy()
        if not self.header.quantiser.sound(array):
            raise TeacherError(
                f"teacher {self.teacher} gave tokens near {self.data.keys[batch.indices[0] - self.first]} that are not "
                "finite or too large to store: use precision=fp32, or other weights"
            )
        return array
