"""Small caches and configs that the stages' tests share."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stages import extract_teacher_features, finetune, pretrain
from stages.extract_teacher_features import ExtractConfig
from stages.pretrain import PretrainConfig
from tests.servers import s3_server

MICRO = {
    "name": "mrmae_vit_tiny_patch16", "image_size": 64, "dim": 48, "depth": 2, "num_heads": 3,
    "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip
TEACHER = {"spec": "timm:test_vit", "weights": "random", "image_size": 64}


def extract_config(images: Path, cache: Path, **changes: Any) -> ExtractConfig:
    """Extraction of every image under `images` by a random ViT-Ti at 64 pixels, 8 samples a shard."""
    keys: dict[str, Any] = {
        "data": {"path": str(images), "workers": 0},
        "teacher": TEACHER,
        "views": {"count": 2, "image_size": 64},
        "cache": {"path": str(cache), "samples_per_shard": 8},
        "batch_size": 16,
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            keys[section] = {**keys[section], name: value}
        else:
            keys[section] = value
    return ExtractConfig.model_validate(keys)


def pretrain_config(output: Path, **changes: Any) -> PretrainConfig:
    """Six steps of a micro student; give `data` and `cache`."""
    keys: dict[str, Any] = {
        "output": str(output),
        "student": MICRO,
        "optim": {"lr": 1e-3, "warmup_epochs": 0},
        "batch_size": 8,
        "max_steps": 6,
        "log_every": 1,
        "checkpoint_every": 100,
        "tensorboard": False,
    }
    return PretrainConfig.model_validate({**keys, **changes})


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The URL of an S3 server with the bucket `bucket`."""
    with s3_server() as url:
        yield url


@pytest.fixture(scope="session")
def extracted(image_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A finished cache of `image_tree` with some keys changed, extracted once a session: copy it before you write."""
    paths: dict[str, Path] = {}

    def extract(**changes: Any) -> Path:
        keys = json.dumps(changes, sort_keys=True)
        if keys not in paths:
            path = tmp_path_factory.mktemp("extracted") / "cache"
            extract_teacher_features.run(extract_config(image_tree, path, **changes))
            paths[keys] = path
        return paths[keys]

    return extract


@pytest.fixture(scope="session", params=["zarr", "webdataset"])
def cache(
    request: pytest.FixtureRequest, extracted: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished cache of `image_tree`, in each store."""
    path = tmp_path_factory.mktemp("cache") / str(request.param)
    return Path(shutil.copytree(extracted(cache__store=request.param), path))


@pytest.fixture
def make_cache(image_tree: Path, tmp_path: Path, extracted: Callable[..., Path]) -> Callable[..., Path]:
    """A cache with some keys changed (`views__count=1`): a copy of its own for each test.

    That of `image_tree` is extracted once a session, so make it before you patch what extraction uses.
    """

    def make(name: str = "cache", images: Path = image_tree, **changes: Any) -> Path:
        path = tmp_path / name
        if images == image_tree:
            return Path(shutil.copytree(extracted(**changes), path))
        extract_teacher_features.run(extract_config(images, path, **changes))
        return path

    return make


ENCODER = {key: value for key, value in MICRO.items() if not key.startswith("decoder_")}
PLAIN = {"rand_augment": None, "mixup": 0.0, "cutmix": 0.0, "erase": 0.0, "smoothing": 0.0, "hflip": 0.0}


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that differ in colour: learnable in seconds."""
    root = tmp_path_factory.mktemp("colours")
    for number in range(36):
        label, rest = number % 3, number * 5
        folder = root / ("val" if number >= 24 else "train") / ("red", "green", "blue")[label]
        folder.mkdir(parents=True, exist_ok=True)
        pixel = tuple(200 - rest % 60 if channel == label else 30 + rest % 40 for channel in range(3))
        Image.new("RGB", (64, 64), pixel).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def student_run(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained micro student."""
    root = tmp_path_factory.mktemp("student")
    extract_teacher_features.run(extract_config(colours / "train", root / "cache", cache__max_nmse=1.0))
    data = {"path": str(colours / "train"), "workers": 0}
    pretrain.run(pretrain_config(root / "student", data=data, cache={"path": str(root / "cache")}))
    return root / "student"


def sets(colours: Path) -> dict[str, Any]:
    return {name: {"path": str(colours / folder), "workers": 0} for name, folder in (("data", "train"), ("val", "val"))}


def finetune_config(colours: Path, output: Path, **changes: Any) -> finetune.FinetuneConfig:
    keys = {
        **sets(colours),
        "output": str(output),
        "image_size": 64,
        "augment": PLAIN,
        "optim": {"lr": 3e-3, "warmup_epochs": 0},
        "drop_path": 0.0,
        "batch_size": 8,
        "max_steps": 30,
        "tensorboard": False,
    }
    return finetune.FinetuneConfig.model_validate({**keys, **changes})
