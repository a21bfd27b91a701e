"""Stage 1, `mrmae extract-teacher-features`: images → views → teacher → cache.

    mrmae extract-teacher-features data.path=/data/imagenet/train teacher.spec=clip_vitb16 cache.path=/data/clip

Run again after a stop, it keeps what is committed. Under torchrun or accelerate launch each process takes its share of
the shards; the first one calibrates the quantiser and creates the cache, the others wait for it.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from pipeline.assembly import load_teacher
from pipeline.cache import (
    CacheHeader,
    CacheReader,
    FidelityFigures,
    create_cache,
    match_header,
    open_cache,
    open_writer,
    read_commit,
    read_header,
    wait_for_cache,
)
from pipeline.cache.budget import estimate_bytes, require_room
from pipeline.config import Config, PathField
from pipeline.data.images import DataConfig, ImageSource, open_images
from pipeline.data.views import ViewConfig
from pipeline.errors import CacheError, ConfigError, DataError
from pipeline.extraction import Extractor
from pipeline.processes import processes
from pipeline.progress import Progress
from pipeline.teachers.config import TeacherConfig


class CacheOutput(Config):
    """Where the features go, and in what form."""

    path: PathField
    store: Literal["zarr", "webdataset"] = "zarr"
    quantiser: Literal["int8", "float16", "float32"] = "int8"
    samples_per_shard: int = Field(1024, ge=1, le=65536)  # one file a shard and view: 154 MB at 196x768
    attention: Literal["mean", "heads"] = "mean"  # heads: one row each, for people who want to look
    calibration: int = Field(256, ge=1)  # samples that the channel statistics are measured on
    max_nmse: float = Field(1e-2, gt=0)  # what a shard may lose in its worst channel; int8 loses about 5e-5
    min_cosine: float = Field(0.999, gt=0, le=1)  # of its LayerNormed tokens, on average; int8 keeps about 0.9998


class ExtractConfig(Config):
    """Everything `extract-teacher-features` takes."""

    data: DataConfig
    teacher: TeacherConfig
    views: ViewConfig = ViewConfig()
    cache: CacheOutput
    batch_size: int = Field(64, ge=1)  # views per forward pass of the teacher
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on CUDA, fp32 on CPUs
    max_tombstones: float = Field(0.01, ge=0, le=1)  # share of unreadable images above which the run fails


def run(config: ExtractConfig, init_only: bool = False, shard_range: str | None = None) -> dict[str, Any]:
    """Extract every shard that isn't committed yet; returns what was done.

    Raises:
        CacheError: the folder holds another cache, the disk lacks the room, or quantisation lost more than allowed.
        DataError: no images, or more unreadable ones than `max_tombstones`.
    """
    state = processes()
    source = open_images(config.data.path, config.data.limit)
    teacher = load_teacher(config.teacher, state.device, _dtype(config.precision, state.device))
    extractor = Extractor(source, config.views, teacher, config.batch_size, config.data.workers, config.cache.store)
    header = _open(config, extractor, first=state.is_main_process)
    if init_only:
        return {"cache": str(config.cache.path), "shards": header.shards, "extracted": 0}

    writer = open_writer(config.cache.path)
    mine = _shards(header, shard_range)[state.process_index :: state.num_processes]
    todo = [shard for shard in mine if not writer.is_committed(shard)]
    began = time.perf_counter()
    images = sum(len(header.shard_range(shard)) for shard in todo)
    with Progress(images, "extract", "img", show=state.is_main_process) as progress:
        bounds = {"max_nmse": config.cache.max_nmse, "min_cosine": config.cache.min_cosine}
        summary = extractor.run(writer, todo, bounds, progress.advance)
    seconds = time.perf_counter() - began
    state.wait_for_everyone()
    return _report(config, source, summary.images, seconds)


def _open(config: ExtractConfig, extractor: Extractor, first: bool) -> CacheHeader:
    """The cache's header: the existing one if it is the same cache, else a new one, made by the first process alone."""
    path, output = Path(config.cache.path), config.cache
    wish = extractor.describe(output.attention, output.samples_per_shard, {"name": output.quantiser})
    if not first:
        wait_for_cache(path)
    elif not (path / "cache.json").exists():
        _require_room(path, wish)
        quantiser = extractor.calibrate(output.quantiser, output.calibration)
        state = quantiser.to_json() | ({"calibration": output.calibration} if quantiser.mean.size else {})
        create_cache(path, extractor.describe(output.attention, output.samples_per_shard, state))
    header = read_header(path)
    match_header(path, header, wish)
    return header


def _require_room(path: Path, wish: CacheHeader) -> None:
    """Refuse before the first byte what the disk can't hold."""
    needed = estimate_bytes(
        samples=wish.count,
        views=wish.views,
        tokens=wish.tokens,
        dim=wish.dim,
        store=wish.store,
        quantiser=wish.quantiser.name,
        attention=wish.attention,
        heads=wish.heads,
    )
    require_room(path, needed)


def _shards(header: CacheHeader, shard_range: str | None) -> Sequence[int]:
    if shard_range is None:
        return range(header.shards)
    first, colon, last = shard_range.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and int(first) < int(last) <= header.shards):
        raise ConfigError(f"--shard-range {shard_range}: give A:B with 0 <= A < B <= {header.shards}")
    return range(int(first), int(last))


def _report(config: ExtractConfig, source: ImageSource, images: int, seconds: float) -> dict[str, Any]:
    """Facts of this run and of the whole cache; raises if too many images were unreadable."""
    reader = open_cache(config.cache.path)
    lost = reader.tombstones
    missing = len(reader.missing_shards())
    if len(lost) > config.max_tombstones * len(reader):
        index, reason = next(iter(lost.items()))
        raise DataError(
            f"{len(lost)} of {len(reader)} images can't be read (the first: {source.key(index)}, {reason}); repair "
            "them and extract into a new folder, or raise max_tombstones to go on without them"
        )
    facts: dict[str, Any] = {
        "cache": str(config.cache.path),
        "images": images,
        "images_per_s": images * config.views.count / seconds if images else 0.0,
        "shards": f"{reader.header.shards - missing} of {reader.header.shards}",
        "unreadable": len(lost),
    }
    if lost:
        facts["unreadable_keys"] = [source.key(index) for index in list(lost)[:10]]
    return facts | _fidelity(reader)


def _fidelity(reader: CacheReader) -> dict[str, Any]:
    """How well the quantised tokens of all finished shards stand for the teacher's."""
    done = sorted(set(range(reader.header.shards)) - set(reader.missing_shards()))
    figures = FidelityFigures.merge(read_commit(reader.path, reader.header, shard).fidelity for shard in done)
    return figures.model_dump(exclude_none=True) if figures else {}


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == "bf16" and device.type == "cpu":
        raise CacheError("precision=bf16 is for GPUs: on a CPU it is several times slower; use fp32")
    return torch.bfloat16 if precision != "fp32" and device.type == "cuda" else torch.float32
