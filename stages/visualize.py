"""Draw what a student and its teacher see.

    mrmae visualize init=runs/photos data.path=/data/photos cache.path=/data/photos_dino
    mrmae visualize init=runs/photos images=[cat.jpg,dog.jpg] teacher.spec=dino_vitb16 output=pictures.png

Reads a checkpoint (init), images (images=[FILE,...] or data.path), and for the teacher a cache (cache.path) or a live
one (teacher.spec). Writes one PNG: output, by default visualize.png in the run folder. Costs a forward pass of a few
images.

The columns, as far as the checkpoint and the teacher have them: input, masked input, reconstruction, the teacher's and
the student's attention, and the principal components of both sides' patch features as colours. For a `detect` run: the
images with the boxes, masks and names that the detector puts on them.
"""

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, Strict, model_validator
from torch import Tensor

from pipeline.assembly.caches import CacheInput
from pipeline.assembly.detectors import load_detector
from pipeline.assembly.inspection import PatchFeatures, Reconstruction, choose_patches, patch_features, reconstruct
from pipeline.assembly.samples import PretrainDataset
from pipeline.assembly.students import load_encoder
from pipeline.assembly.teachers import load_teacher
from pipeline.cache import open_cache
from pipeline.config import Config, PathField
from pipeline.data.decoding import decode
from pipeline.data.images import DataConfig, open_images
from pipeline.data.masks import Focus, MaskSampler
from pipeline.data.views import ViewConfig, center_view, render, to_chw, view_of_epoch
from pipeline.detection.dataset import canvases
from pipeline.detection.pictures import detected_scene, draw_scenes
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.pictures import as_maps, as_pictures, draw_grid, head_maps, overlay, pca_maps
from pipeline.models import Classifier, Student, read_weights
from pipeline.models.student_config import StudentConfig
from pipeline.ownership import stage
from pipeline.pixels import normalise
from pipeline.processes import processes
from pipeline.teachers import Teacher, build_teacher
from pipeline.teachers.teacher_config import TeacherConfig
from pipeline.training.checkpoint import resolve_checkpoint

_CHUNK = 8  # images through a network at once: sixty-four at 224 px would want a training run's memory


class VisualizeConfig(Config):
    """Everything `visualize` takes."""

    init: PathField  # a run, a checkpoint or a public weights file
    student: StudentConfig | None = None  # for a lone weights file
    images: Annotated[tuple[PathField, ...], Strict(False)] = ()  # image files
    data: DataConfig | None = None  # or images by data.path, as in extraction
    samples: Annotated[tuple[int, ...], Strict(False)] = ()  # which of data.path; default: `count`, evenly spread
    count: int = Field(6, ge=1, le=64)
    cache: CacheInput | None = None  # the teacher as cached: its views, tokens and attention
    teacher: TeacherConfig | None = None  # or a live one
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    focus: Focus | None = None  # default: sampled by the teacher's attention, if any
    crop: float = Field(1.0, gt=0, le=1)  # central share of images that no cache gives a view of
    min_score: float = Field(0.5, ge=0, le=1)  # of what a detector shows
    seed: int = Field(0, ge=0)
    output: PathField | None = None  # the PNG; default: visualize.png in the run folder `init`

    @model_validator(mode="after")
    def _one_source_of_each(self) -> "VisualizeConfig":
        if bool(self.images) == (self.data is not None) and not (self.cache and not self.images):
            raise ValueError("give either images=[FILE,...] or data.path=...")
        if self.cache and (self.teacher or self.images):
            raise ValueError("cache.path brings its own teacher and views: give it with data.path alone")
        return self


class Shown(NamedTuple):
    """The images uint8 [N, 3, S, S], what they are called, and what the teacher made of them."""

    images: Tensor
    names: list[str]
    teacher: PatchFeatures | None


@stage
def run(config: VisualizeConfig) -> dict[str, Any]:
    """Draw; returns where the picture lies and what it shows."""
    device = processes().device
    if _is_detector(config.init):
        return _detections(config, device)
    model = load_encoder(config.init, config.student).to(device).eval()
    encoder = model if isinstance(model, Classifier) else model.encoder
    shown = _cached(config, encoder.image_size[0]) if config.cache else _given(config, encoder.image_size[0], device)
    network = build_teacher(f"mrmae:{config.init}", module=encoder, device=device)
    student = _features(network, shown.images, f"student: {config.init}", device)

    pictures = as_pictures(shown.images / 255)
    columns: dict[str, Any] = {"input": pictures}
    result: dict[str, Any] = {}
    if isinstance(model, Student) and model.objective.pixels:
        completed, result = _reconstruction(config, model, shown, device)
        columns |= completed
    shown_features = {"teacher": shown.teacher, "student": student}
    asked = {
        "teacher": "",
        "student": "\n(of the class token)" if encoder.attention_query == "cls" else "\n(mean query)",
    }
    for who, features in shown_features.items():
        if features and features.attention is not None:
            columns[f"{who}'s attention{asked[who]}"] = overlay(pictures, as_maps(features.attention, features.grid))
    if shown.teacher and shown.teacher.heads is not None:
        columns["teacher's heads\n(a map each)"] = head_maps(shown.teacher.heads, shown.teacher.grid)
    for who, features in shown_features.items():
        if features:
            columns[f"{who}'s features\n(PCA as RGB)"] = pca_maps(features.tokens, features.grid)
    title = "    ".join(features.name for features in shown_features.values() if features)
    picture = draw_grid(_output(config), columns, title, shown.names)
    return {"picture": str(picture), "columns": [" ".join(name.split()) for name in columns], **result}


def _is_detector(init: Path) -> bool:
    checkpoint = resolve_checkpoint(init)
    return checkpoint.is_dir() and (read_weights(checkpoint)[1] or {}).get("kind") == "detector"


@torch.inference_mode()
def _detections(config: VisualizeConfig, device: torch.device) -> dict[str, Any]:
    """Boxes, masks and names that a detector puts on whole images."""
    if config.cache or config.teacher:
        raise ConfigError(f"init={config.init} is a detector: leave cache and teacher out")
    model = load_detector(config.init).to(device).eval()
    names, files = _files(config)
    images = [_decode(name, file) for name, file in zip(names, files, strict=True)]
    found = []
    for start in range(0, len(images), _CHUNK):
        batch = canvases(images[start : start + _CHUNK], model.spec["encoder"]["image_size"])
        found += model.detect(normalise(batch.images.to(device)), batch.sizes, batch.original_sizes)
    categories = [(number, name) for number, name in model.spec["categories"]]
    scenes = [
        detected_scene(np.asarray(image), instances, categories, config.min_score)
        for image, instances in zip(images, found, strict=True)
    ]
    column = f"detected, score ≥ {config.min_score}"
    picture = draw_scenes(_output(config), {column: scenes}, str(config.init))
    return {"picture": str(picture), "columns": [column], "instances": sum(len(scene.names) for scene in scenes)}


def _reconstruction(
    config: VisualizeConfig, model: Student, shown: Shown, device: torch.device
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The columns of the masked input and its completion, and the pixel loss on these masks."""
    teacher = shown.teacher
    attended = teacher is not None and teacher.attention is not None and teacher.grid == model.grid
    focus = config.focus or ("sampled" if attended else "random")
    if focus != "random" and not attended:
        raise ConfigError(f"focus={focus} needs a teacher with attention on the student's grid: give cache.path")
    rows = teacher.attention.numpy() if teacher and teacher.attention is not None and focus != "random" else None
    patches = model.grid[0] * model.grid[1]
    ids = choose_patches(len(shown.images), patches, config.mask_ratio, rows, focus, config.seed)
    reconstruction = _reconstruct(model, shown.images, ids, device)
    how = {"random": "drawn at random", "sampled": "drawn by attention", "top-k": "most attended"}[focus]
    masked = f"masked input\n({ids.shape[1]} of {patches} {how})"
    # Normalised patches are predicted up to their mean and contrast, which the picture takes from the truth.
    given = "(true mean, contrast)" if model.norm_pix_loss else "(visible ones kept)"
    columns = {
        masked: as_pictures(reconstruction.masked),
        f"reconstruction\n{given}": as_pictures(reconstruction.completed),
    }
    return columns, {"pixel_loss": reconstruction.loss}


def _features(network: Teacher, images: Tensor, name: str, device: torch.device) -> PatchFeatures:
    chunks = [patch_features(network, chunk.to(device), name) for chunk in images.split(_CHUNK)]
    attention = [chunk.attention for chunk in chunks if chunk.attention is not None]
    tokens = torch.cat([chunk.tokens for chunk in chunks])
    return PatchFeatures(tokens, torch.cat(attention) if attention else None, network.grid, name)


def _reconstruct(model: Student, images: Tensor, ids: Tensor, device: torch.device) -> Reconstruction:
    chunks = list(zip(images.split(_CHUNK), ids.split(_CHUNK), strict=True))
    parts = [reconstruct(model, chunk.to(device), ids_keep.to(device)) for chunk, ids_keep in chunks]
    loss = sum(part.loss * len(part.masked) for part in parts) / len(images)
    masked, completed = (
        torch.cat(pictures) for pictures in zip(*((p.masked, p.completed) for p in parts), strict=True)
    )
    return Reconstruction(masked, completed, loss)


def _cached(config: VisualizeConfig, size: int) -> Shown:
    """Views as the cache holds them, with the tokens and the attention that a student learned from."""
    assert config.cache is not None
    reader = open_cache(config.cache.place)
    views = ViewConfig.model_validate(reader.header.view_policy.model_dump())
    if views.image_size != size:
        raise ConfigError(f"the cache's views have {views.image_size} pixels, init={config.init} takes {size}")
    source = open_images(config.data.path, config.data.limit) if config.data else None
    if source and source.digest() != reader.header.dataset.digest:
        raise ConfigError(
            f"the cache was not made of data.path={source.root}: give its images, and the same data.limit"
        )
    live = reader.live_indices()
    chosen = _chosen(config, [int(index) for index in live], len(reader))
    h, w = reader.header.grid
    dataset = PretrainDataset(source, {"teacher": reader}, views, MaskSampler(h * w, 1, "random", seed=0), "none")
    images = dataset.__getitems__([(0, index) for index in chosen]).images
    records = [reader.read(index, view_of_epoch(index, 0, views.count), dequantise=True) for index in chosen]
    tokens = torch.from_numpy(np.stack([record.tokens for record in records]))
    attention = heads = None
    if records[0].attention is not None:
        attention = torch.from_numpy(np.stack([np.asarray(record.attention, np.float32) for record in records]))
    if attention is not None and reader.header.attention == "heads":
        heads, attention = attention, attention.mean(1)  # [N, H, L], [N, L]
    name = f"teacher: {reader.header.teacher['name']} ({config.cache.path})"
    return Shown(images, [record.key for record in records], PatchFeatures(tokens, attention, (h, w), name, heads))


def _given(config: VisualizeConfig, size: int, device: torch.device) -> Shown:
    """Central crops of image files or of a data set, looked at by a live teacher if one is named."""
    names, files = _files(config)
    crops = [_crop(name, file, config.crop, size) for name, file in zip(names, files, strict=True)]
    images = to_chw(np.stack(crops))
    if config.teacher is None:
        return Shown(images, names, None)
    teacher = load_teacher(config.teacher, device)
    return Shown(images, names, _features(teacher, images, f"teacher: {teacher.name}", device))


def _files(config: VisualizeConfig) -> tuple[list[str], list[bytes]]:
    """What the images are called, and their bytes."""
    if config.images:
        return [path.name for path in config.images], [_read(path) for path in config.images]
    assert config.data is not None
    source = open_images(config.data.path, config.data.limit)
    chosen = _chosen(config, list(range(len(source))), len(source))
    return [source.key(index) for index in chosen], [source.read(index) for index in chosen]


def _chosen(config: VisualizeConfig, available: list[int], length: int) -> list[int]:
    strange = set(config.samples) - set(available)
    if strange:
        raise ConfigError(f"samples={min(strange)}: there are samples 0 to {length - 1}, without unreadable ones")
    count = min(config.count, len(available))
    return list(config.samples) or [available[place * len(available) // count] for place in range(count)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"images: {path}: {error.strerror or error}") from error


def _crop(name: str, file: bytes, crop: float, size: int) -> NDArray[np.uint8]:
    image = _decode(name, file)
    return np.asarray(render(image, center_view(image.height, image.width, crop), size))


def _decode(name: str, file: bytes) -> Image.Image:
    try:
        return decode(file)
    except DataError as error:
        raise DataError(f"image {name}: {error}") from error


def _output(config: VisualizeConfig) -> Path:
    if config.output is not None:
        return config.output
    if not (config.init / "checkpoints").is_dir():
        raise ConfigError(f"init={config.init} is no run folder to put a picture into: give output=FILE.png")
    return config.init / "visualize.png"
