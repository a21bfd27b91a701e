"""Small caches and configs that the stages' tests share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages import extract_teacher_features
from stages.extract_teacher_features import ExtractConfig
from stages.pretrain import PretrainConfig

MICRO = {
    "name": "mrmae_vit_tiny_patch16", "image_size": 64, "dim": 48, "depth": 2, "num_heads": 3,
    "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip
TEACHER = {"spec": "timm:vit_tiny_patch16_224", "weights": "random", "image_size": 64}


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


@pytest.fixture(scope="session", params=["zarr", "webdataset"])
def cache(request: pytest.FixtureRequest, image_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of `image_tree`, in each store."""
    path = tmp_path_factory.mktemp("cache") / str(request.param)
    extract_teacher_features.run(extract_config(image_tree, path, cache__store=request.param))
    return path


@pytest.fixture
def make_cache(image_tree: Path, tmp_path: Path) -> Callable[..., Path]:
    """Extract a cache with some keys changed (`views__count=1`)."""

    def make(name: str = "cache", images: Path = image_tree, **changes: Any) -> Path:
        extract_teacher_features.run(extract_config(images, tmp_path / name, **changes))
        return tmp_path / name

    return make
