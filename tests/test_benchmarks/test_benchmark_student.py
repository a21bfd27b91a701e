"""The benchmark stage on students small enough to build in a second."""

import json
from typing import Any

import pytest

from benchmarks.configs.student import BenchmarkStudentConfig
from benchmarks.student import run
from pipeline.errors import ConfigError


def config(**options: Any) -> BenchmarkStudentConfig:
    small = {"image_size": 32, "batch_size": 2, "rounds": 1, "threads": 1, "device": "cpu", "peak_memory": False}
    return BenchmarkStudentConfig(**{**small, **options})


def test_convvit_is_compared_and_vit_is_timed() -> None:
    figures = run(config(students=["mrmae_convvit_small_patch16", "mrmae_vit_tiny_patch16"]))
    json.dumps(figures)
    convvit, vit = (figures["students"][name]["eager"] for name in figures["students"])
    for part in ("encoder", "step"):
        low, high = convvit[part]["speedup_range"]
        assert low <= convvit[part]["speedup"] <= high
        assert convvit[part]["dense"].keys() == {"seconds", "images_per_s"}
        assert vit[part].keys() == {"visible"}


def test_peak_memory_is_of_a_fresh_process() -> None:
    figures = run(config(students=["mrmae_vit_tiny_patch16"], peak_memory=True))
    peak = figures["students"]["mrmae_vit_tiny_patch16"]["eager"]["step"]["visible"]["peak_memory_mib"]
    assert 100 < peak < 4000


def test_unknown_students_are_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mrmae_vit_tiny_patch16'"):
        run(config(students=["mrmae_vit_tiny_patch1"]))
