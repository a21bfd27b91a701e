"""What a student mimics in a step: targets that came from caches, or a live teacher's, for comparison.

Both take a batch as the loader made it, on the device, and say which patches are visible and what the teachers said of
the rows that the objective asks for. Views and masks are the same functions of (seed, epoch, index) for both.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from pipeline.assembly.samples import PretrainBatch
from pipeline.data.masks import select_visible
from pipeline.models.masking import complement, gather_tokens
from pipeline.teachers import Teacher, run_teachers, share_backbones

Dequantise = Callable[[Tensor, Tensor | None], Tensor]


class Targets(Protocol):
    """(ids_keep int64 [B, K], teacher → raw tokens float32 [B, R, D]) of a batch."""

    def __call__(self, batch: PretrainBatch) -> tuple[Tensor, dict[str, Tensor]]: ...


class CachedTargets:
    """The rows that the loader read, dequantised on the device."""

    def __init__(self, dequantise: Mapping[str, Dequantise]) -> None:
        self._dequantise = dict(dequantise)

    def __call__(self, batch: PretrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.ids_keep is not None
        targets = {name: self._dequantise[name](values, scale) for name, (values, scale) in batch.targets.items()}
        return batch.ids_keep, targets


class OnlineTargets:
    """Teachers that look at every batch: what a cache saves. The first one's attention is what focus goes by.

    Args:
        teachers: name → teacher; those of equal weights share one forward.
        keep: K, visible patches.
        rows: "visible", "masked" or "none".
        masks_per_sample: equal images that follow each other in a batch; a teacher sees them once.
    """

    def __init__(self, teachers: Mapping[str, Teacher], keep: int, rows: str, masks_per_sample: int) -> None:
        self._teachers, self._keep, self._rows, self._repeats = dict(teachers), keep, rows, masks_per_sample
        share_backbones(list(self._teachers.values()))

    @torch.no_grad()
    def __call__(self, batch: PretrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = run_teachers(list(self._teachers.values()), batch.images[:: self._repeats])
        ids_keep = batch.ids_keep
        if ids_keep is None:
            attention = outputs[0].attention
            assert attention is not None
            ids_keep = select_visible(self._each_mask(attention), batch.gumbel, self._keep)
        if self._rows == "none":
            return ids_keep, {}
        tokens = {name: self._each_mask(out.tokens) for name, out in zip(self._teachers, outputs, strict=True)}
        ids = ids_keep if self._rows == "visible" else complement(ids_keep, outputs[0].tokens.shape[1])
        return ids_keep, {name: gather_tokens(values, ids) for name, values in tokens.items()}

    def _each_mask(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self._repeats, 0) if self._repeats > 1 else values
