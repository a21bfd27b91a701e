"""The deep level of verification: the live teacher looks at a few views again, and should see what is stored."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.cache.check.report import Report
from pipeline.cache.format.quantiser import Quantiser
from pipeline.cache.format.records import Record
from pipeline.cache.reader import CacheReader, open_cache
from pipeline.errors import CacheDamage, CacheError

# What may be lost besides what the quantiser loses of the same tokens.
MIN_COSINE = 0.998  # a q95 JPEG between teacher and student gives 0.987
MAX_NMSE = 0.01  # sees what a LayerNormed cosine doesn't: tokens of another scale or offset
MAX_ATTENTION = 0.02  # L1 distance of two distributions over tokens
_BATCH = 32


class _Agreement(NamedTuple):
    """How well tokens [L, D] agree with others."""

    cosine: float  # of LayerNormed tokens, on average
    nmse: float  # squared error over the variance of channels, summed


@dataclass(slots=True)
class Reextracted:
    """What the teacher says about one view now, in the form of a record before quantisation."""

    tokens: NDArray[np.float32]  # [L, D]
    attention: NDArray[np.floating[Any]] | None  # [L] or [H, L], as the header asks
    box: tuple[int, int, int, int]  # top, left, height, width, drawn again
    hflip: bool
    source_hash: int  # of the image as it is now
    image: bytes | None = None  # the stored view rendered again, where that is the same to the byte; else None


class Reextract(Protocol):
    """Runs the live teacher over given views: the stage's render and teacher, wrapped.

    `indices` and `views` run in parallel and name one record each; one result for each, in that order. A view must be
    drawn from the header's policy and rendered from its image again, not taken from the cache; a store that keeps
    images runs the teacher on the view after its JPEG, as extraction does. An unreadable image is a PipelineError.
    """

    def __call__(self, indices: Sequence[int], views: Sequence[int]) -> Iterable[Reextracted]: ...


def compare(path: Path, reextract: Reextract, samples: int, report: Report) -> None:
    """Compare `samples` random records with the live teacher; adds findings and the figures of all of them."""
    try:
        reader = open_cache(path)
    except CacheDamage:
        return  # a commit record is damaged, as a finding says already
    header, random, live = reader.header, np.random.default_rng(0), reader.live_indices()
    if len(live) == 0:
        return
    indices = np.sort(random.choice(live, min(samples, len(live)), replace=False)).tolist()
    views = random.integers(header.views, size=len(indices)).tolist()
    cosines, errors = [], []
    for start in range(0, len(indices), _BATCH):
        batch, batch_views = indices[start : start + _BATCH], views[start : start + _BATCH]
        for index, view, fresh in zip(batch, batch_views, reextract(batch, batch_views), strict=True):
            record = _read(reader, index, view)
            if record is None:
                continue
            found = _agreement(record.tokens, fresh.tokens)
            cosines.append(found.cosine)
            errors.append(found.nmse)
            for problem in _problems(record, fresh, found, _bounds(header.quantiser, fresh.tokens)):
                message = f"shard {index // header.samples_per_shard}, sample {index}, view {view}: {problem}"
                report.add("deep", message, shard=index // header.samples_per_shard, sample=index, view=view)
    report.counts["deep"] = len(cosines)
    if cosines:
        report.figures.update(cosine_mean=float(np.mean(cosines)), cosine_worst=min(cosines), nmse_worst=max(errors))


def _read(reader: CacheReader, index: int, view: int) -> Record | None:
    try:
        return reader.read(index, view, dequantise=True)
    except CacheError:
        return None  # the full pass has reported it


def _problems(record: Record, fresh: Reextracted, found: _Agreement, bounds: _Agreement) -> list[str]:
    problems = []
    if not (found.cosine >= bounds.cosine and found.nmse <= bounds.nmse):
        problems.append(
            f"the teacher now sees other tokens (cosine {found.cosine:.4f}, at least {bounds.cosine:.3f}; error "
            f"{found.nmse:.2g}, at most {bounds.nmse:.2g}): other weights, preprocessing or image"
        )
    if record.attention is not None and fresh.attention is not None:
        distance = np.abs(record.attention.astype(np.float32) - fresh.attention).sum(-1).max()
        if not distance <= MAX_ATTENTION:
            problems.append(f"the teacher now attends elsewhere (L1 distance {distance:.3f}, at most {MAX_ATTENTION})")
    if tuple(record.box.tolist()) != tuple(fresh.box) or record.hflip != fresh.hflip:
        problems.append(f"the view policy now draws box {fresh.box}, flip {fresh.hflip}")
    if record.source_hash != fresh.source_hash:
        problems.append(f"image '{record.key}' has changed since it was extracted")
    if fresh.image is not None and record.image != fresh.image:
        problems.append("the stored image is not the view that is rendered now")
    return problems


def _bounds(quantiser: Quantiser, fresh: NDArray[np.float32]) -> _Agreement:
    """What the stored tokens must reach: the fixed bounds, less what the quantiser loses of the fresh tokens [L, D]."""
    stored, scale = quantiser.quantise(torch.from_numpy(np.ascontiguousarray(fresh)))
    kept = _agreement(quantiser.dequantise(stored, scale).numpy(), fresh)
    return _Agreement(MIN_COSINE - (1 - kept.cosine), MAX_NMSE + kept.nmse)


def _agreement(stored: NDArray[np.float32], fresh: NDArray[np.float32]) -> _Agreement:
    a, b = (tokens - tokens.mean(-1, keepdims=True) for tokens in (stored, fresh))
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = np.where(lengths > 0, (a * b).sum(-1) / np.maximum(lengths, 1e-12), 1.0)
    spread = np.square(fresh - fresh.mean(0)).sum()
    return _Agreement(float(cosine.mean()), float(np.square(stored - fresh).sum() / max(float(spread), 1e-12)))
