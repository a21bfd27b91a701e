"""RandAugment: every operation of timm's at every level; one bit is left at least, and the rest is timm's own."""

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform

from pipeline.configs.data import DataConfig, ViewConfig
from pipeline.data.augment import rand_augment
from pipeline.data.labelled import LabelledDataset, open_labelled
from pipeline.errors import DataError
from stages.configs.finetune import AugmentConfig

DEFAULT = "rand-m9-mstd0.5-inc1"


def noise(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "policy", [DEFAULT, "rand-m9-mstd0.5", "rand-m0", "rand-m30-mmax30-inc1", "rand-m9-t3aw", "rand-m9-tweights"]
)
def test_every_operation_takes_every_level(policy: str) -> None:
    augment = rand_augment(str(AugmentConfig(rand_augment=policy).rand_augment), 16)
    for operation in augment.ops:
        operation.prob, operation.magnitude_std = 1.0, 0
        for magnitude in np.linspace(0, operation.magnitude_max or 10, 21).tolist():
            operation.magnitude = magnitude
            image = operation(noise())
            assert (image.mode, image.size) == ("RGB", (16, 16))


def test_posterising_keeps_one_bit_at_least_and_is_timms_otherwise() -> None:
    """As strong as it gets, but no black image."""
    (operation,) = (op for op in rand_augment(DEFAULT, 16).ops if op.name == "PosterizeIncreasing")
    operation.prob, operation.magnitude_std = 1.0, 0
    for magnitude, bits in ((0, 4), (5, 2), (7.5, 1), (9.9, 1), (10, 1)):
        operation.magnitude = magnitude
        np.testing.assert_array_equal(operation(noise()), posterize(noise(), bits))
    assert set(np.unique(operation(noise()))) == {0, 128}


def test_the_rest_of_the_policy_is_timms_own() -> None:
    options = {"translate_const": 7, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    policy = "rand-m6-mstd0.5-inc1"  # far from the bound, where timm alone fails
    theirs, ours = rand_augment_transform(policy, options), rand_augment(policy, 16)
    for seed in range(200):
        images = []
        for augment in (theirs, ours):
            random.seed(seed)
            np.random.seed(seed)
            images.append(np.asarray(augment(noise(seed))))
        np.testing.assert_array_equal(*images)


def test_an_image_that_can_not_be_augmented_is_named(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        noise().save(tmp_path / name / "1.png")

    def broken(_: Image.Image) -> Image.Image:
        raise ValueError("bits must\nbe positive")

    source = open_labelled("data.path", DataConfig(path=str(tmp_path)))
    dataset = LabelledDataset(source, 8, views=ViewConfig(image_size=8), augment=broken)
    with pytest.raises(
        DataError, match=r"^image dog/1\.png: ValueError: bits must be positive; change augment\.\*, or "
    ):
        dataset.__getitems__([(0, 1)])
