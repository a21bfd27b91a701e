"""The whole of `benchmark gpu` in a tiny form, and what becomes of parts that don't fit, fail or are cut off."""

import json
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu as benchmark_gpu
from benchmarks.configs.gpu import BenchmarkGpuConfig
from benchmarks.gpu import run
from benchmarks.harness import Bench
from benchmarks.parts import Part
from tests.test_benchmarks.conftest import VIT_TI
from tests.test_stages.conftest import MICRO

CONVVIT = {
    "name": "mrmae_convvit_small_patch16", "image_size": 64, "dim": 48, "depth": 1, "num_heads": 3,
    "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def config(**changes: Any) -> BenchmarkGpuConfig:
    keys: dict[str, Any] = {
        "students": [MICRO, CONVVIT], "teachers": [VIT_TI], "sparse": ["mrmae_convvit_small_patch16"],
        "image_size": 64, "images": 16, "copies": 2, "batch_size": 8, "sparse_batch_size": 1, "seconds": 0.01,
        "steps": 1, "compile": False, "workers": 0, "minutes": 60,
    }  # fmt: skip
    return BenchmarkGpuConfig.model_validate({**keys, **changes})


def test_every_part_is_measured_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="benchmarks"):
        figures = run(config(patience=99))
    json.dumps(figures)
    names = ["images", f"extract {VIT_TI['spec']}", f"steps {MICRO['name']} eager", f"steps {CONVVIT['name']} eager"]
    names.append("sparse mrmae_convvit_small_patch16 eager")
    assert set(figures["parts"]) == set(names), figures["failed"]
    assert figures["skipped"] == []
    assert figures["failed"] == {}
    for name in names:
        assert f"{name}: " in caplog.text
    assert figures["parts"]["images"]["drawn"] == 16
    extract = figures["parts"][names[1]]
    assert extract["views"] == 16  # the least: in 0.01 s the bare forward would do one
    assert min(extract[f"{what}_views_per_s"] for what in ("bare", "stage", "steady")) > 0
    for name in names[2:4]:
        assert set(figures["parts"][name]["images_per_s"]) == {"mae", "cached", "cached_cross", "online"}
        assert min(figures["parts"][name]["loader_images_per_s"].values()) > 0
    assert figures["parts"][names[4]]["step"]["speedup"] > 0


def test_the_order_is_that_of_importance_and_compiled_parts_are_in_it(tmp_path: Path) -> None:
    bench = Bench(torch.device("cpu"), torch.float32, tmp_path)
    names = [part.name for part in benchmark_gpu.list_parts(BenchmarkGpuConfig(), bench)]
    assert names[:4] == [
        "images",
        "extract clip_vitb16",
        "steps mrmae_vit_base_patch16 eager",
        "steps mrmae_vit_base_patch16 compiled",
    ]
    assert len(names) == 1 + 2 + 3 * 2 + 2


def measure(monkeypatch: pytest.MonkeyPatch, jobs: dict[str, Callable[[], dict[str, Any]]], **changes: Any) -> Any:
    """What `benchmark gpu` returns where these are its parts, each of one second."""
    parts = [Part(name, 1.0, job) for name, job in jobs.items()]
    monkeypatch.setattr(benchmark_gpu, "list_parts", lambda config, bench: parts)
    return run(config(**changes))


def test_what_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure(monkeypatch, {"one": dict, "two": dict}, minutes=0.05)["skipped"] == ["one", "two"]


def test_a_part_that_fails_or_takes_too_long_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> dict[str, Any]:
        raise MemoryError("the card is full\nof tensors")

    def slow() -> dict[str, Any]:
        time.sleep(60)
        return {}

    began = time.monotonic()
    figures = measure(monkeypatch, {"full": full, "slow": slow, "good": lambda: {"rate": 7}}, patience=1)
    assert time.monotonic() - began < 30
    assert figures["failed"] == {"full": "MemoryError: the card is full", "slow": "stopped after 1 s"}
    assert figures["parts"]["good"]["rate"] == 7


def test_a_signal_ends_the_rest_and_the_figures_so_far_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def struck() -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        return {}

    former = signal.getsignal(signal.SIGTERM)
    figures = measure(monkeypatch, {"good": lambda: {"rate": 7}, "struck": struck, "never": dict})
    assert figures["stopped"] == "SIGTERM"
    assert set(figures["parts"]) == {"good"}
    assert signal.getsignal(signal.SIGTERM) is former
