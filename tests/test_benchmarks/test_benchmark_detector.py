"""The detector's benchmark at a size that takes a second."""

import json

import pytest

from benchmarks.configs.detector import BenchmarkDetectorConfig
from benchmarks.detector import run
from pipeline.errors import ConfigError

SMALL = {"channels": 16, "rois": 16}


def test_every_student_is_measured() -> None:
    names = ["mrmae_vit_tiny_patch16", "mrmae_convvit_small_patch16"]
    config = {"students": names, "image_size": 64, "rounds": 1, "threads": 1, "device": "cpu", "detector": SMALL}
    figures = run(BenchmarkDetectorConfig.model_validate(config))
    json.dumps(figures)
    for name in names:
        student = figures["students"][name]
        assert 0 < student["gmacs_an_image"]["encoder"] < student["gmacs_an_image"]["all"]
        assert student["step_s_range"][0] <= student["step_s"] <= student["step_s_range"][1]


def test_the_encoders_cost_is_known() -> None:
    """ViT-Ti/16 at 224 px is 1.25 GMACs with its attention (DeiT's paper says 1.3 of the whole)."""
    config = {
        "students": ["mrmae_vit_tiny_patch16"],
        "image_size": 224,
        "rounds": 0,
        "device": "cpu",
        "detector": SMALL,
    }
    student = run(BenchmarkDetectorConfig.model_validate(config))["students"]["mrmae_vit_tiny_patch16"]
    assert student["gmacs_an_image"]["encoder"] == pytest.approx(1.25, abs=0.1)


def test_an_unknown_student_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mrmae_vit_tiny_patch16'"):
        run(BenchmarkDetectorConfig(students=["mrmae_vit_tiny_patch1"]))
