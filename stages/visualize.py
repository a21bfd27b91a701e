"""Draw what a student and its teacher see.

    mrmae visualize init=runs/photos data.path=/data/photos cache.path=/data/photos_dino
    mrmae visualize init=runs/both data.path=/data/photos caches.a.path=/data/dino caches.b.path=/data/clip
    mrmae visualize init=runs/photos 'images=[cat.jpg,dog.jpg]' teacher.spec=dino_vitb16 output=pictures.png

Reads a checkpoint (init), images (images=[FILE,...] or data.path), and for the teachers caches (cache.path, or
caches.NAME.path for several) or a live one (teacher.spec). Writes a PNG: output, by default visualize.png in the run
folder. Beside it lies NAME_attention.png, with the attention over the photos at full size, if there is any. Costs a
forward pass of a few images.

The columns, as far as the checkpoint and the teachers have them: input, masked input, reconstruction, attention of each
teacher and of the student, and the principal components of their patch features as colours. For a `detect` run: the
images with the boxes, masks and names that the detector puts on them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.assembly.caches import live_samples, match_images, open_caches, place_of, views_of
from pipeline.assembly.detectors import load_detector
from pipeline.assembly.inspection import PatchFeatures, Reconstruction, choose_patches, patch_features, reconstruct
from pipeline.assembly.samples import PretrainDataset
from pipeline.assembly.students import load_encoder
from pipeline.assembly.teachers import load_teacher
from pipeline.cache import CacheReader
from pipeline.configs.cache import CacheInput
from pipeline.data.decoding import decode
from pipeline.data.images import open_images
from pipeline.data.masks import MaskSampler
from pipeline.data.views import center_view, render, to_chw, view_of_epoch
from pipeline.detection.dataset import canvases
from pipeline.detection.pictures import detected_scene, draw_scenes
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.pictures import as_maps, as_pictures, draw_grid, head_maps, highlight, overlay, pca_maps
from pipeline.models import Classifier, Student, read_weights
from pipeline.ownership import stage
from pipeline.pixels import normalise
from pipeline.processes import processes
from pipeline.teachers import Teacher, build_teacher
from pipeline.training.checkpoint import resolve_checkpoint
from stages.configs.visualize import VisualizeConfig

_PHOTO = 512  # pixels of a side at least, where attention lies over photos
_CHUNK = 8  # images through a network at once: sixty-four at 224 px would want a training run's memory


class Shown(NamedTuple):
    """The views uint8 [N, 3, S, S], the same views larger, their names, and what each teacher made of them."""

    images: Tensor
    photos: Tensor  # uint8 [N, 3, P, P], P >= S
    names: list[str]
    teachers: dict[str, PatchFeatures]  # by what the columns call it: teacher, or teacher NAME


@stage
def run(config: VisualizeConfig) -> dict[str, Any]:
    """Draw; returns where the picture lies and what it shows."""
    device = processes().device
    if _is_detector(config.init):
        return _detections(config, device)
    model = load_encoder(config.init, config.student).to(device).eval()
    encoder = model if isinstance(model, Classifier) else model.encoder
    caches = {"": config.cache} if config.cache else config.caches
    size = encoder.image_size[0]
    shown = _cached(config, caches, size) if caches else _given(config, size, device)
    network = build_teacher(f"mrmae:{config.init}", module=encoder, device=device)
    student = _features(network, shown.images, f"student: {config.init}", device)

    pictures = as_pictures(shown.images / 255)
    columns: dict[str, Any] = {"input": pictures}
    result: dict[str, Any] = {}
    if isinstance(model, Student) and model.objective.pixels:
        completed, result = _reconstruction(config, model, shown, device)
        columns |= completed
    shown_features = {**shown.teachers, "student": student}
    asked = {"student": "\n(of the class token)" if encoder.attention_query == "cls" else "\n(mean query)"}
    for who, features in shown_features.items():
        if features.attention is not None:
            maps = as_maps(features.attention, features.grid)
            columns[f"{who}'s attention{asked.get(who, '')}"] = overlay(pictures, maps)
    for who, features in shown_features.items():
        if features.heads is not None:
            columns[f"{who}'s heads\n(a map each)"] = head_maps(features.heads, features.grid)
    for who, features in shown_features.items():
        columns[f"{who}'s features\n(PCA as RGB)"] = pca_maps(features.tokens, features.grid)
    title = "    ".join(features.name for features in shown_features.values())
    picture = draw_grid(_output(config), columns, title, shown.names)
    result |= _draw_attention(picture, shown, shown_features, title)
    return {"picture": str(picture), "columns": [" ".join(name.split()) for name in columns], **result}


def _draw_attention(
    picture: Path, shown: Shown, shown_features: Mapping[str, PatchFeatures], title: str
) -> dict[str, str]:
    """Each one's attention over the photos, in a picture beside `picture`; nothing where nobody has attention."""
    photos = as_pictures(shown.photos / 255)
    columns = {
        who: highlight(photos, as_maps(features.attention, features.grid))
        for who, features in shown_features.items()
        if features.attention is not None
    }
    if not columns:
        return {}
    file = picture.with_stem(f"{picture.stem}_attention")
    side = shown.photos.shape[-1] / 130
    return {"attention": str(draw_grid(file, {"photo": photos, **columns}, title, shown.names, side))}


def _is_detector(init: Path) -> bool:
    checkpoint = resolve_checkpoint(init)
    return checkpoint.is_dir() and (read_weights(checkpoint)[1] or {}).get("kind") == "detector"


@torch.inference_mode()
def _detections(config: VisualizeConfig, device: torch.device) -> dict[str, Any]:
    """Boxes, masks and names that a detector puts on whole images."""
    if config.cache or config.caches or config.teacher:
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
    attention = next(
        (t.attention for t in shown.teachers.values() if t.attention is not None and t.grid == model.grid), None
    )
    focus = config.focus or ("random" if attention is None else "sampled")
    if focus != "random" and attention is None:
        raise ConfigError(f"focus={focus} needs a teacher with attention on the student's grid: give cache.path")
    rows = None if attention is None or focus == "random" else attention.numpy()
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


def _cached(config: VisualizeConfig, caches: Mapping[str, CacheInput], size: int) -> Shown:
    """Views as the caches hold them, with the tokens and the attention that a student learned from."""
    readers = open_caches({name: place_of(cache) for name, cache in caches.items()})
    views = views_of(readers)
    if views.image_size != size:
        raise ConfigError(f"the cache's views have {views.image_size} pixels, init={config.init} takes {size}")
    source = open_images(config.data.path, config.data.limit) if config.data else None
    if source:
        match_images(readers, source)
    chosen = _chosen(config, live_samples(readers).tolist(), len(next(iter(readers.values()))))
    first, requests = next(iter(readers.values())), [(0, index) for index in chosen]
    masks = MaskSampler(1, 1, "random", seed=0)
    images = PretrainDataset(source, readers, views, masks, "none").__getitems__(requests).images
    photos = images
    if first.header.store != "webdataset":  # which has the views as they were rendered
        larger = views.model_copy(update={"image_size": max(size, _PHOTO)})
        photos = PretrainDataset(source, readers, larger, masks, "none").__getitems__(requests).images
    places = [(index, view_of_epoch(index, 0, views.count)) for index in chosen]
    labels = [f"teacher {name}" for name in readers] if len(readers) > 1 else ["teacher"]
    teachers = {label: _stored(reader, places) for label, reader in zip(labels, readers.values(), strict=True)}
    keys = [first.read(*place).key for place in places]
    return Shown(images, photos, keys, teachers)


def _stored(reader: CacheReader, places: Sequence[tuple[int, int]]) -> PatchFeatures:
    """What a cache holds of (index, view) places."""
    records = [reader.read(*place, dequantise=True) for place in places]
    tokens = torch.from_numpy(np.stack([record.tokens for record in records]))
    attention = heads = None
    if records[0].attention is not None:
        attention = torch.from_numpy(np.stack([np.asarray(record.attention, np.float32) for record in records]))
    if attention is not None and reader.header.attention == "heads":
        heads, attention = attention, attention.mean(1)  # [N, H, L], [N, L]
    name = f"teacher: {reader.header.teacher['name']} ({reader.path})"
    return PatchFeatures(tokens, attention, reader.header.grid, name, heads)


def _given(config: VisualizeConfig, size: int, device: torch.device) -> Shown:
    """Central crops of image files or of a data set, looked at by a live teacher if one is named."""
    names, files = _files(config)
    images, photos = (
        to_chw(np.stack([_crop(name, file, config.crop, side) for name, file in zip(names, files, strict=True)]))
        for side in (size, max(size, _PHOTO))
    )
    if config.teacher is None:
        return Shown(images, photos, names, {})
    teacher = load_teacher(config.teacher, device)
    return Shown(images, photos, names, {"teacher": _features(teacher, images, f"teacher: {teacher.name}", device)})


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
