"""Micro detectors and a small annotated data set."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.detection import CocoImages, Detector, DetectorConfig, open_coco
from pipeline.models import Classifier, build_classifier
from tests.coco import write_coco
from tests.micro import NAMES, kind, seeded  # noqa: F401 - fixtures

SIZES = {"patch_size": 8, "dim": 48, "depth": 4, "num_heads": 3}
OPTIONS = {"window": 4, "channels": 16, "anchors": [8, 16, 24, 32, 48], "rois": 16}


@pytest.fixture
def classifier() -> Callable[..., Classifier]:
    def build(family: str, image_size: Any, **changes: Any) -> Classifier:
        model = build_classifier(NAMES[family], 3, **{**SIZES, "image_size": image_size, **changes})
        for parameter in model.parameters():
            if parameter.requires_grad:  # sine-cosine positions and zero biases would hide mistakes
                torch.nn.init.normal_(parameter, std=0.1)
        return model.eval()

    return build


@pytest.fixture
def detector(classifier: Callable[..., Classifier]) -> Callable[..., Detector]:
    def build(family: str, image_size: int = 64, **changes: Any) -> Detector:
        options = {**DetectorConfig().model_dump(), **OPTIONS, **changes}
        encoder = build_classifier(NAMES[family], 1, **{**SIZES, "image_size": image_size}).encoder
        return Detector(encoder, classes=3, spec={}, **options)

    return build


@pytest.fixture
def coco(tmp_path: Path) -> CocoImages:
    return open_coco(*write_coco(tmp_path))
