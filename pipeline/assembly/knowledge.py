"""What a student mimics: targets from caches, or from live teachers, of which there may be none (plain MAE).

Both kinds know the images, the views and the samples of a run, the shape of its targets, the data set that the workers
read, and how a batch on the device gets its targets. Views and masks are the same functions of (seed, epoch, index) for
both, so a live teacher and its cache show a student the same thing.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.assembly.caches import (
    check_records,
    live_samples,
    match_images,
    open_caches,
    spread_records,
    views_of,
)
from pipeline.assembly.extraction import Extractor
from pipeline.assembly.resizing import Grid, resize_attention
from pipeline.assembly.samples import PretrainBatch, PretrainDataset, repeat_for_masks
from pipeline.cache import CacheReader, Quantiser, RemoteCache
from pipeline.configs.data import ViewConfig
from pipeline.configs.models import MimicTarget
from pipeline.data.images import ImageSource, open_images
from pipeline.data.masks import MaskSampler, select_predicted, select_visible
from pipeline.data.readable import leave_unreadable_out
from pipeline.errors import CacheError, ConfigError
from pipeline.models.phi_s import mean_and_covariance
from pipeline.models.summary import angular_dispersion
from pipeline.teachers import Teacher, run_teachers, share_backbones


class Shown(NamedTuple):
    """What a student is shown beside the images: `student(images, *shown)`."""

    ids_keep: Tensor  # int64 [B, K]
    targets: dict[str, Tensor]  # teacher → raw tokens float32 [B, R, D], or clusters int64 [B, R]
    ids_predict: Tensor | None  # int64 [B, P]; None for all masked patches
    summaries: dict[str, Tensor]  # teacher → raw class tokens float32 [B, D], if the data set is asked for them


Targets = Callable[[PretrainBatch], Shown]  # of a batch on the device
Statistics = dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]  # teacher → mean and deviation [D]
Covariances = dict[str, tuple[Tensor, Tensor]]  # teacher → mean [D] and covariance [D, D], float64

_CALIBRATION = 256  # images that tell a live teacher's channel statistics, as in extraction
_TOKENS_PER_CHANNEL = 20  # that a covariance is measured on, at least
_BLOCK = 1024  # samples that an order of blocks takes together where there are no shards


@dataclass(frozen=True)
class CachedKnowledge:
    """Targets that were extracted before.

    Attributes:
        target: what a student predicts of them: tokens, or the clusters that caches of codes hold.
        caches: teacher → reader; they agree on images and views.
        source: the images; None where the first cache stores the views.
    """

    caches: dict[str, CacheReader]
    source: ImageSource | None
    views: ViewConfig
    samples: NDArray[np.int64]  # ascending
    target: MimicTarget = "tokens"

    @property
    def dims(self) -> dict[str, int]:
        """Channels of each teacher's tokens; with target codes, clusters of its codebook."""
        headers = {name: cache.header for name, cache in self.caches.items()}
        codes = self.target == "codes"
        return {name: header.quantiser.clusters if codes else header.dim for name, header in headers.items()}

    @property
    def grids(self) -> dict[str, Grid]:
        """(h, w) cells of each teacher's tokens."""
        return {name: cache.header.grid for name, cache in self.caches.items()}

    @property
    def attended(self) -> str | None:
        """The first teacher with attention to focus by."""
        return next((name for name, cache in self.caches.items() if cache.header.attention != "none"), None)

    @property
    def without_summary(self) -> list[str]:
        """The teachers whose class tokens are not to be had."""
        return [name for name, cache in self.caches.items() if cache.header.summary is None]

    @property
    def block(self) -> int:
        """Samples that lie together."""
        return self._first.header.samples_per_shard

    @property
    def _first(self) -> CacheReader:
        return next(iter(self.caches.values()))

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it goes on from; fingerprints know the images."""
        return {"caches": {name: cache.header.fingerprint for name, cache in self.caches.items()}, "data": None}

    def statistics(self, _target_norm: str, _workers: int) -> Statistics:
        """The channel statistics that the caches were quantised by."""
        quantisers = {name: cache.header.quantiser for name, cache in self.caches.items()}
        return {name: (q.mean, q.std) for name, q in quantisers.items() if q.mean.size}

    def covariances(self, _workers: int) -> Covariances:
        """Mean and covariance of the tokens in a fixed choice of each cache's records."""
        found = {}
        for name, cache in self.caches.items():
            records = spread_records(cache, self.samples, _images_for(cache.header.dim, cache.header.tokens))
            found[name] = mean_and_covariance(torch.from_numpy(record.tokens) for record in records)
        return found

    def dispersions(self, _workers: int) -> dict[str, Tensor]:
        """Angular dispersion of the class tokens of view 0 of some samples, as live teachers measure it."""
        count = min(_CALIBRATION, len(self.samples))
        records = {name: spread_records(cache, self.samples, count) for name, cache in self.caches.items()}
        return {name: angular_dispersion(torch.from_numpy(r.summary) for r in of) for name, of in records.items()}

    def check(self, samples: NDArray[np.int64], seed: int, count: int) -> str:
        """See `check_records`."""
        return check_records(self.caches, self.source, samples, seed, count)

    def dataset(
        self, masks: MaskSampler, rows: str, grid: Grid | None = None, summaries: bool = False
    ) -> PretrainDataset:
        """Samples for a student with this grid; None stands for the caches' own."""
        return PretrainDataset(self.source, self.caches, self.views, masks, rows, grid=grid, summaries=summaries)

    def targets(self, dataset: PretrainDataset) -> Targets:
        """The rows that the workers read, dequantised on the device; teachers on another grid are resized first.

        Codes stay as they are, but for those on another grid: the resized tokens get codes again.
        """
        quantisers = {name: cache.header.quantiser for name, cache in self.caches.items()}
        codes = self.target == "codes"

        def summary(name: str, stored: tuple[Tensor, Tensor | None]) -> Tensor:
            values: Tensor = self.caches[name].header.summary_quantiser.dequantise(*stored)
            return repeat_for_masks(values.squeeze(1), dataset.masks.count)

        def targets(batch: PretrainBatch) -> Shown:
            assert batch.ids_keep is not None
            tokens = {
                name: _ids(stored[0]) if codes and name not in dataset.resized else quantisers[name].dequantise(*stored)
                for name, stored in batch.targets.items()
            }
            maps = {name: tokens[name] for name in dataset.resized & tokens.keys()}
            if maps:
                rows = dataset.rows_of_maps(maps, self.grids, batch.ids_keep, batch.ids_predict)
                tokens |= {name: _ids(quantisers[name].quantise(of)[0]) if codes else of for name, of in rows.items()}
            summaries = {name: summary(name, stored) for name, stored in batch.summaries.items()}
            return Shown(batch.ids_keep, tokens, batch.ids_predict, summaries)

        return targets


@dataclass(frozen=True)
class LiveKnowledge:
    """Teachers that look at every batch, which is what a cache saves; without any, plain MAE.

    Attributes:
        teachers: name → teacher; those of equal weights share one forward.
    """

    teachers: dict[str, Teacher]
    source: ImageSource
    views: ViewConfig

    block = _BLOCK

    @property
    def samples(self) -> NDArray[np.int64]:
        return np.arange(len(self.source), dtype=np.int64)

    @property
    def dims(self) -> dict[str, int]:
        """Channels of each teacher's tokens."""
        return {name: teacher.dim for name, teacher in self.teachers.items()}

    @property
    def grids(self) -> dict[str, Grid]:
        """(h, w) cells of each teacher's tokens."""
        return {name: teacher.grid for name, teacher in self.teachers.items()}

    @property
    def attended(self) -> str | None:
        """The first teacher with attention to focus by."""
        return next((name for name, teacher in self.teachers.items() if teacher.has_attention), None)

    @property
    def without_summary(self) -> list[str]:
        """The teachers whose class tokens are not to be had."""
        return [name for name, teacher in self.teachers.items() if not teacher.has_summary]

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it goes on from."""
        live = {name: teacher.identity() for name, teacher in self.teachers.items()}
        return {"caches": {}, "data": self.source.digest()} | ({"teachers": live} if live else {})

    def recall(self, identity: Mapping[str, Any]) -> None:
        """Let teachers go on by the digest that a run of before recorded, if that was of resampled weights."""
        recorded = identity.get("teachers", {})
        for name in self.teachers.keys() & recorded.keys():
            self.teachers[name].recognises(recorded[name]["weights_sha256"])

    def statistics(self, target_norm: str, workers: int) -> Statistics:
        """The channel statistics of the first images' tokens, where `target_norm` asks for them."""
        if not self.teachers or target_norm == "layernorm":
            return {}
        outputs = self._extractor(workers).sample(_CALIBRATION)
        quantisers = [Quantiser.calibrate("int8", output.tokens) for output in outputs]
        return {name: (q.mean, q.std) for name, q in zip(self.teachers, quantisers, strict=True)}

    def covariances(self, workers: int) -> Covariances:
        """Mean and covariance of the tokens of the first views of some images, spread evenly over all."""
        if not self.teachers:
            return {}
        images = max(_images_for(teacher.dim, math.prod(teacher.grid)) for teacher in self.teachers.values())
        outputs = self._extractor(workers).sample(images)
        return {name: mean_and_covariance(out.tokens) for name, out in zip(self.teachers, outputs, strict=True)}

    def dispersions(self, workers: int) -> dict[str, Tensor]:
        """Angular dispersion of each teacher's class tokens of the first views of some images."""
        outputs = zip(self.teachers, self._extractor(workers).sample(_CALIBRATION), strict=True)
        return {name: angular_dispersion([out.summary]) for name, out in outputs if out.summary is not None}

    def _extractor(self, workers: int) -> Extractor:
        return Extractor(self.source, self.views, list(self.teachers.values()), 64, workers, store="zarr")

    def dataset(
        self, masks: MaskSampler, rows: str, grid: Grid | None = None, summaries: bool = False
    ) -> PretrainDataset:
        """Samples for a student with this grid; None stands for the teachers' own."""
        online = bool(self.teachers)
        return PretrainDataset(self.source, {}, self.views, masks, rows, online, grid, summaries)

    def targets(self, dataset: PretrainDataset) -> Targets:
        """What the teachers say of a batch's views; each distinct view is shown to them once."""
        teachers, masks = list(self.teachers.values()), dataset.masks
        split = masks.count if masks.shares_a_draw else 1
        share_backbones(teachers)

        @torch.no_grad()
        def targets(batch: PretrainBatch) -> Shown:
            outputs = run_teachers(teachers, batch.images[:: masks.count]) if teachers else []
            ids_keep, ids_predict = batch.ids_keep, batch.ids_predict
            if ids_keep is None:
                number = next(n for n, output in enumerate(outputs) if output.attention is not None)
                attention, grid = outputs[number].attention, teachers[number].grid
                assert attention is not None
                attention = resize_attention(attention, grid, dataset.grid or grid)
                attention = repeat_for_masks(attention, masks.count // split)
                ids_keep = select_visible(attention, batch.gumbel, masks.keep, split)
                if batch.lots is not None and masks.predict is not None:
                    ids_predict = select_predicted(batch.lots, ids_keep, masks.predict)
            of_teachers = dict(zip(self.teachers, outputs, strict=True))
            tokens = {name: output.tokens for name, output in of_teachers.items() if dataset.rows != "none"}
            summaries = {
                name: repeat_for_masks(output.summary.squeeze(1), masks.count)
                for name, output in of_teachers.items()
                if dataset.summaries and output.summary is not None
            }
            shown_tokens = dataset.rows_of_maps(tokens, self.grids, ids_keep, ids_predict)
            return Shown(ids_keep, shown_tokens, ids_predict, summaries)

        return targets


Knowledge = CachedKnowledge | LiveKnowledge


def open_cached(
    paths: Mapping[str, Path | RemoteCache], path: str | None, limit: int | None, target: MimicTarget = "tokens"
) -> CachedKnowledge:
    """Caches, and the images that they were made of.

    Args:
        paths: teacher → cache; an empty name stands for the cache's own.
        path: of the images; a cache that stores the views needs none.
        limit: of the images.
        target: what a student will predict; codes need caches of codes.

    Raises:
        CacheError: the caches are unfinished, or don't fit together, to the images or to the target.
        ConfigError: there are no images.
    """
    caches = open_caches(paths)
    source = None
    if path is not None:
        source = open_images(path, limit)
        match_images(caches, source)
    elif not next(iter(caches.values())).stores_images:
        raise _no_images()
    elif limit is not None:
        raise ConfigError("data.limit chooses among the images of data.path, and there is none: leave it out")
    for name, cache in caches.items():
        if target == "codes" and not cache.header.quantiser.clusters:
            raise CacheError(
                f"cache {name} holds {cache.header.quantiser.name} tokens, and mimic.target=codes needs codes: extract "
                "into a new folder with cache.quantiser=codes, or set mimic.target=tokens"
            )
    return CachedKnowledge(caches, source, views_of(caches), live_samples(caches), target)


def open_live(teachers: Mapping[str, Teacher], path: str | None, limit: int | None, views: ViewConfig) -> LiveKnowledge:
    """Images for live teachers, or for none.

    Raises:
        ConfigError: there are no images. DataError: too many of them can't be read.
    """
    if path is None:
        raise _no_images()
    # A cache knows which images can't be read, and leaves them out.
    (source,) = leave_unreadable_out({"data.path": open_images(path, limit)})
    return LiveKnowledge(dict(teachers), source, views)


def _ids(stored: Tensor) -> Tensor:
    """Codes as a cache has them, uint16 [..., 1], → clusters int64 [...]."""
    return stored.squeeze(-1).long()


def _images_for(dim: int, tokens: int) -> int:
    """How many images of so many tokens tell a covariance of `dim` channels."""
    return max(_CALIBRATION, math.ceil(_TOKENS_PER_CHANNEL * dim / tokens))


def _no_images() -> ConfigError:
    return ConfigError("'data.path' is missing: give data.path=... (only a webdataset cache holds the images)")
