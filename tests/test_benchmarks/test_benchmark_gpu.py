"""The whole of `benchmark gpu` in a tiny form, and what becomes of parts that don't fit, fail or are cut off."""

import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import gpu as benchmark_gpu
from benchmarks.gpu import BenchmarkGpuConfig, run
from tests.test_stages.conftest import MICRO, TEACHER

CONVVIT = {
    "name": "mrmae_convvit_small_patch16", "image_size": 64, "dim": 48, "depth": 1, "num_heads": 3,
    "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(**changes: Any) -> BenchmarkGpuConfig:
    keys: dict[str, Any] = {
        "students": [MICRO, CONVVIT], "teachers": [TEACHER], "sparse": ["mrmae_convvit_small_patch16"],
        "image_size": 64, "images": 16, "copies": 2, "batch_size": 8, "sparse_batch_size": 1, "seconds": 0.01,
        "steps": 1, "compile": False, "workers": 0, "minutes": 60,
    }  # fmt: skip
    return BenchmarkGpuConfig.model_validate({**keys, **changes})


def test_every_part_is_measured_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="stages"):
        figures = run(config(patience=99))
    json.dumps(figures)
    names = [f"extract {TEACHER['spec']}", f"steps {MICRO['name']} eager", f"steps {CONVVIT['name']} eager"]
    names.append("sparse mrmae_convvit_small_patch16 eager")
    assert set(figures["parts"]) == set(names), figures["failed"]
    assert figures["skipped"] == []
    assert figures["failed"] == {}
    for name in names:
        assert f"{name}: " in caplog.text
    extract = figures["parts"][names[0]]
    assert extract["views"] == 30  # three shards of ten: whole ones alone
    assert min(extract[f"{what}_views_per_s"] for what in ("bare", "stage", "steady")) > 0
    for name in names[1:3]:
        assert set(figures["parts"][name]["images_per_s"]) == {"mae", "cached", "online"}
        assert min(figures["parts"][name]["loader_images_per_s"].values()) > 0
    assert figures["parts"][names[3]]["step"]["speedup"] > 0


def test_the_order_is_that_of_importance_and_compiled_parts_are_in_it() -> None:
    class Bench:
        config = BenchmarkGpuConfig()
        extract = steps = sparse = dict

    names = [part.name for part in benchmark_gpu._parts(Bench())]  # type: ignore[arg-type]
    assert names[:3] == [
        "extract clip_vitb16",
        "steps mrmae_vit_base_patch16 eager",
        "steps mrmae_vit_base_patch16 compiled",
    ]
    assert len(names) == 2 + 3 * 2 + 2


def parts(monkeypatch: pytest.MonkeyPatch, **jobs: Any) -> None:
    monkeypatch.setattr(
        benchmark_gpu, "_parts", lambda _: [benchmark_gpu._Part(n, 1.0, job) for n, job in jobs.items()]
    )


def test_what_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    parts(monkeypatch, one=dict, two=dict)
    assert run(config(minutes=0.05))["skipped"] == ["one", "two"]


def test_a_part_that_fails_or_takes_too_long_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> dict[str, Any]:
        raise MemoryError("the card is full\nof tensors")

    parts(monkeypatch, full=full, slow=lambda: time.sleep(60), good=lambda: {"rate": 7})
    began = time.monotonic()
    figures = run(config())
    assert time.monotonic() - began < 30
    assert figures["failed"] == {"full": "MemoryError: the card is full", "slow": "stopped after 3 s"}
    assert figures["parts"]["good"]["rate"] == 7


def test_a_signal_ends_the_rest_and_the_figures_so_far_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def struck() -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        return {}

    former = signal.getsignal(signal.SIGTERM)
    parts(monkeypatch, good=lambda: {"rate": 7}, struck=struck, never=dict)
    figures = run(config())
    assert figures["stopped"] == "SIGTERM"
    assert set(figures["parts"]) == {"good"}
    assert signal.getsignal(signal.SIGTERM) is former
