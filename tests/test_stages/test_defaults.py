"""Every stage with its own defaults: a default that no test runs is not tested.

Only what decides the size is given: paths, a micro model, a small batch and few steps.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import cli
from pipeline.assembly.samples import PretrainDataset
from pipeline.configs.data import MaskConfig, ViewConfig
from pipeline.data.images import ImageSource, open_images
from pipeline.data.labelled import LabelledDataset
from pipeline.data.masks import MaskSampler, visible_count
from pipeline.detection import DetectionDataset, JitterConfig, open_coco
from stages.configs.finetune import AugmentConfig, FinetuneConfig
from stages.finetune import _augment, _Losses
from tests.coco import write_coco
from tests.test_stages.conftest import ENCODER, MICRO

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 32
REQUESTS = [(epoch, index) for epoch in range(100) for index in range(20)]  # two thousand, each another view
STUDENT = [f"student.{key}={value}" for key, value in MICRO.items()]
ALONE = [f"student.{key}={value}" for key, value in ENCODER.items()]


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ of two classes: twenty and eight images of noise, of all shapes."""
    root = tmp_path_factory.mktemp("noise")
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 8)):
        for number in range(count):
            folder = root / split / ("a", "b")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            shape = (*generator.integers(1, 90, 2).tolist(), 3)
            Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{number:02d}.png")
    return root


@pytest.fixture(scope="module")
def source(noise: Path) -> ImageSource:
    return open_images(str(noise / "train"))


def test_finetunes_recipe_takes_two_thousand_images(source: ImageSource, noise: Path) -> None:
    """Crop, flip and RandAugment in the worker; erasing, mixup, cutmix and smoothing on the device."""
    config = FinetuneConfig.model_validate({"data": {"path": str(noise)}, "output": "unused"})
    assert config.augment == AugmentConfig()
    views = ViewConfig(image_size=SIDE, scale=config.augment.scale, hflip=config.augment.hflip)
    dataset = LabelledDataset(source, SIDE, views=views, augment=_augment(config, SIDE))
    losses = _Losses(config, classes=2)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIDE * SIDE, 2))
    for start in range(0, len(REQUESTS), 200):
        batch = dataset.__getitems__(REQUESTS[start : start + 200])
        assert batch.images.shape == (200, 3, SIDE, SIDE)
        assert losses(model, batch)["loss"].isfinite()


def test_pretrainings_views_and_masks_take_two_thousand_images(source: ImageSource) -> None:
    views = ViewConfig().model_copy(update={"image_size": SIDE})
    defaults = MaskConfig()
    keep = visible_count(16, defaults.mask_ratio)
    masks = MaskSampler(16, keep, "random", seed=0, count=defaults.masks_per_sample)
    dataset = PretrainDataset(source, {}, views, masks, "none")
    batch = dataset.__getitems__(REQUESTS)
    assert batch.images.shape == (2000, 3, SIDE, SIDE)
    assert batch.ids_keep is not None
    assert batch.ids_keep.shape == (2000, 4)


def test_detections_jitter_takes_two_thousand_images(tmp_path: Path) -> None:
    dataset = DetectionDataset(open_coco(*write_coco(tmp_path)), SIDE, jitter=JitterConfig())
    for epoch in range(0, 500, 50):
        batch = dataset.__getitems__([(epoch + further, index) for further in range(50) for index in range(4)])
        assert len(batch.targets) == 200


def test_central_crops_take_two_thousand_images(source: ImageSource) -> None:
    """What validation, knn, linear-probe and visualize see."""
    images = LabelledDataset(source, SIDE).__getitems__(REQUESTS).images
    assert images.shape == (2000, 3, SIDE, SIDE)


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(cli.main, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_every_command_on_images_runs_with_its_own_defaults(noise: Path, tmp_path: Path) -> None:
    data, few = f"data.path={noise}", ["batch_size=4", "max_steps=4"]
    mae = ["mimic.objective=mae", f"data.path={noise}/train", f"views.image_size={MICRO['image_size']}"]
    invoke("pretrain", *mae, *STUDENT, *few, f"output={tmp_path}/mae")
    init = f"init={tmp_path}/mae"
    invoke("finetune", data, init, *few, "ema.decay=0.99", f"output={tmp_path}/tuned")
    rows = [json.loads(line) for line in (tmp_path / "tuned/metrics.jsonl").read_text().splitlines()]
    assert any("top1" in row for row in rows)
    invoke("finetune", "--eval", f"init={tmp_path}/tuned", f"val.path={noise}/val")
    for command in ("knn", "linear-probe"):
        assert "top1" in invoke(command, data, init)
    assert "0 of them unreadable" in invoke(
        "predict", f"init={tmp_path}/tuned", f"data.path={noise}/val", f"output={tmp_path}/classes.csv"
    )
    assert "left_out" in invoke("embed", init, f"data.path={noise}/val", f"output={tmp_path}/features.npz")
    for what in ("mae", "tuned"):
        invoke("visualize", f"init={tmp_path}/{what}", f"data.path={noise}/val")
        invoke("export", f"init={tmp_path}/{what}", f"output={tmp_path}/exported-{what}")


@pytest.mark.slow  # the default heads are wide
def test_detect_runs_with_its_own_defaults(tmp_path: Path) -> None:
    """Its detector, too, at the smallest canvas that the pyramid's windows allow."""
    folder, file = write_coco(tmp_path)
    sets = [f"data.{split}.{key}={value}" for split in ("train", "val") for key, value in
            (("images", folder), ("annotations", file))]  # fmt: skip
    small = [key for key in ALONE if "image_size" not in key]
    invoke("detect", *sets, *small, "image_size=64", "batch_size=2", "max_steps=2", f"output={tmp_path}/out")
    invoke("detect", "--eval", *sets[2:], f"output={tmp_path}/out")
