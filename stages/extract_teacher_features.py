"""Stage 1: cache a teacher's features of images.

Runs a teacher over the images once, and caches its token features and attention:

    mrmae extract-teacher-features data.path=/data/imagenet/train teacher.spec=clip_vitb16 cache.path=/data/clip

Reads images (data.path: a class-folder tree, a flat folder, tars or parquet files) and a teacher
(teacher.spec; teacher.weights for a local file). Writes a cache at cache.path: 151 KB a view for 196 tokens of width
768, so 194 GB for ImageNet-1k at views.count=1. `mrmae plan` tells yours. Costs one forward pass of the teacher per
view. To s3:// or gs:// each shard is uploaded when it is whole; until then it lies in cache.local.

Several teachers (teachers.NAME.spec=...) share one reading of the images; each writes to cache.path/NAME. Run the
command again after a stop: finished shards are kept. Under torchrun or accelerate launch each process extracts a share
of the shards.
"""

import logging
import math
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from pipeline.assembly.extraction import Extractor, check_lost
from pipeline.assembly.teachers import load_teacher, teacher_dtype
from pipeline.cache import (
    CacheHeader,
    CacheWriter,
    Commit,
    FidelityFigures,
    Output,
    match_header,
    output_at,
    shard_span,
)
from pipeline.cache.budget import estimate_bytes, require_room
from pipeline.cache.format.header import MAX_SHARDS
from pipeline.cache.shard_writing import SHARDS
from pipeline.configs.cache import default_local
from pipeline.data.images import ImageSource, open_images
from pipeline.errors import ConfigError
from pipeline.ownership import stage
from pipeline.processes import processes, processes_of_node
from pipeline.progress import Progress
from pipeline.teachers import NO_ATTENTION
from stages.configs.extract_teacher_features import CacheOutput, ExtractConfig

log = logging.getLogger(__name__)


@stage
def run(config: ExtractConfig, init_only: bool = False, shard_range: str | None = None) -> dict[str, Any]:
    """Extract every shard that isn't committed yet; returns what was done.

    Raises:
        CacheError: the folder holds another cache, the disk lacks the room, or quantisation lost more than allowed.
        DataError: no images, or more unreadable ones than `max_tombstones`.
    """
    state = processes(patience=timedelta(days=7))  # shares of a large dataset don't end at the same hour
    source = open_images(config.data.path, config.data.limit)
    if len(source) > MAX_SHARDS * config.cache.samples_per_shard:
        raise ConfigError(
            f"cache.samples_per_shard={config.cache.samples_per_shard} makes more than {MAX_SHARDS} shards of "
            f"{len(source)} images: raise it"
        )
    caches = config.caches()
    dtype = teacher_dtype(config.precision, state.device)
    teachers = [load_teacher(teacher, state.device, dtype) for teacher in caches.values()]
    local = config.cache.local or default_local()
    outputs = [output_at(place, local) for place in caches]
    for output, teacher in zip(outputs, teachers, strict=True):
        if (found := output.find()) is not None:
            teacher.recognises(found.teacher["weights_sha256"])
    extractor = Extractor(source, config.views, teachers, config.batch_size, config.data.workers, config.cache.store)
    header = _open(outputs, config.cache, extractor, first=state.is_main_process)
    if init_only:
        return {"cache": str(config.cache.path), "shards": header.shards, "extracted": 0}

    writers = [output.writer() for output in outputs]
    share = shard_span(header, shard_range, "--shard-range")[state.process_index :: state.num_processes]
    todo = [shard for shard in share if not all(writer.is_committed(shard) for writer in writers)]
    began = time.perf_counter()
    views = config.views.count
    total = views * sum(len(header.shard_range(shard)) for shard in todo)
    with Progress(total, "extract", "view", show=state.is_main_process) as progress:
        summary = extractor.run(
            writers, todo, config.cache.bounds, lambda images: progress.advance(views * images), config.max_tombstones
        )
    seconds = time.perf_counter() - began
    state.wait_for_everyone()
    return _report(config, source, writers, {"images": summary.images, "views_per_s": summary.images * views / seconds})


def _open(outputs: Sequence[Output], wanted: CacheOutput, extractor: Extractor, first: bool) -> CacheHeader:
    """Make the caches that aren't there yet, in the first process alone; returns what all have in common, a header.

    Raises:
        CacheError: a folder holds another cache than the one asked for, or the disk lacks the room.
    """
    clusters = wanted.clusters if wanted.quantiser == "codes" else 0
    states: list[dict[str, Any]] = [{"name": wanted.quantiser} | ({"clusters": clusters} if clusters else {})]
    states *= len(outputs)
    wishes = extractor.describe(wanted.attention, wanted.samples_per_shard, states, wanted.summary)
    if first:
        missing = [number for number, output in enumerate(outputs) if output.find() is None]
        if missing:
            _require_room(wanted, [wishes[number] for number in missing])
            for wish in (wishes[number] for number in missing if wishes[number].attention != wanted.attention):
                log.warning("teacher %s: %s", wish.teacher["name"], NO_ATTENTION)
            states = extractor.calibrate(wanted.quantiser, wanted.calibration, wanted.summary, clusters)
            headers = extractor.describe(wanted.attention, wanted.samples_per_shard, states, wanted.summary)
            for number in missing:
                outputs[number].create(headers[number])
    for output, wish in zip(outputs, wishes, strict=True):
        match_header(output.place, output.wait(), wish)
    return wishes[0]


def _require_room(wanted: CacheOutput, wishes: Sequence[CacheHeader]) -> None:
    """Refuse before the first byte what the disk can't hold: the caches, or their shards on the way to a URL.

    The latter are those of all processes of this machine.
    """
    needed, shards = 0, SHARDS * processes_of_node()
    for wish in wishes:
        quantiser = wish.quantiser.name
        view = estimate_bytes(wish.rows, wish.dim, wish.store, quantiser, math.prod(wish.attention_shape or (0,)))
        on_the_way = min(wish.count, shards * wish.samples_per_shard)
        samples = wish.count if isinstance(wanted.path, Path) else on_the_way
        needed += samples * wish.views * view
    require_room(wanted.path if isinstance(wanted.path, Path) else wanted.local or default_local(), needed)


def _report(
    config: ExtractConfig, source: ImageSource, writers: Sequence[CacheWriter], facts: dict[str, Any]
) -> dict[str, Any]:
    """Facts of this run and of the whole caches; raises if too many images were unreadable."""
    finished = [writer.commits() for writer in writers]
    # The same in all caches: they were told by the same decoding.
    lost = {stone.index: stone.error for commit in finished[0] for stone in commit.tombstones}
    check_lost(source, lost, config.max_tombstones)
    facts = {"cache": str(config.cache.path)} | facts
    for name, writer, commits in zip(config.teachers or [""], writers, finished, strict=True):
        of = f"{name}." if name else ""
        facts |= {f"{of}{fact}": value for fact, value in _completeness(writer.header, commits).items()}
    facts["unreadable"] = len(lost)
    if lost:
        facts["unreadable_keys"] = [source.key(index) for index in list(lost)[:10]]
    return facts


def _completeness(header: CacheHeader, commits: Sequence[Commit]) -> dict[str, Any]:
    """How many shards a cache has, and how well its quantised tokens stand for the teacher's."""
    figures = FidelityFigures.merge(commit.fidelity for commit in commits)
    return {"shards": f"{len(commits)} of {header.shards}"} | (figures.model_dump(exclude_none=True) if figures else {})
