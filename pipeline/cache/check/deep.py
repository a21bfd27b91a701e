"""The deep level of verification: the live teacher looks at a few views again, and should see what is stored."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.cache.check.report import Report
from pipeline.cache.format.header import CacheHeader
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
    summary: NDArray[np.float32] | None = None  # [1, D]
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
            found = _agreement(record.tokens, fresh.tokens, header.quantiser.std)
            cosines.append(found.cosine)
            errors.append(found.nmse)
            for problem in _problems(header, record, fresh, found):
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


def _problems(header: CacheHeader, record: Record, fresh: Reextracted, found: _Agreement) -> list[str]:
    problems = []
    remedy = "other weights, preprocessing or image"
    if difference := _differ(found, header.quantiser, fresh.tokens):
        problems.append(f"the teacher now sees other tokens ({difference}): {remedy}")
    if record.summary is not None and fresh.summary is not None:
        quantiser = header.summary_quantiser
        found = _agreement(record.summary, fresh.summary, quantiser.std)
        if difference := _differ(found, quantiser, fresh.summary):
            problems.append(f"the teacher now gives another class token ({difference}): {remedy}")
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


def _differ(found: _Agreement, quantiser: Quantiser, fresh: NDArray[np.float32]) -> str | None:
    """How stored tokens miss what they must reach: the bounds, less what the quantiser loses of `fresh` [L, D]."""
    stored, scale = quantiser.quantise(torch.from_numpy(np.ascontiguousarray(fresh)))
    kept = _agreement(quantiser.dequantise(stored, scale).numpy(), fresh, quantiser.std)
    min_cosine, max_nmse = MIN_COSINE - (1 - kept.cosine), MAX_NMSE + kept.nmse
    if found.cosine >= min_cosine and found.nmse <= max_nmse:
        return None
    return f"cosine {found.cosine:.4f}, at least {min_cosine:.3f}; error {found.nmse:.2g}, at most {max_nmse:.2g}"


def _agreement(stored: NDArray[np.float32], fresh: NDArray[np.float32], deviation: NDArray[np.float32]) -> _Agreement:
    """The agreement of stored tokens [L, D] with fresh ones.

    All tokens of a constant image may be the same: `deviation`, each channel's over the data set ([D], or [0] where
    it was not measured), and a thousandth of the tokens' squares bound the variance from below. One token alone has no
    variance over tokens: that over its channels takes its place.
    """
    a, b = (tokens - tokens.mean(-1, keepdims=True) for tokens in (stored, fresh))
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = np.where(lengths > 0, (a * b).sum(-1) / np.maximum(lengths, 1e-12), 1.0)
    usual = max(len(fresh) * np.square(deviation).sum(), 1e-3 * np.square(fresh).sum(), 1e-12)
    center = fresh.mean(0) if len(fresh) > 1 else fresh.mean()
    spread = max(float(np.square(fresh - center).sum()), float(usual))
    return _Agreement(float(cosine.mean()), float(np.square(stored - fresh).sum() / spread))
