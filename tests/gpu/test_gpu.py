"""What only a GPU can show: steps that don't wait for it, its numbers beside a CPU's, resuming, processes over NCCL."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.assembly.extraction import Extractor
from pipeline.assembly.teachers import load_teacher
from pipeline.cache import Quantiser, open_cache
from pipeline.configs.data import ViewConfig
from pipeline.configs.teachers import TeacherConfig
from pipeline.data.images import open_images
from pipeline.evaluation.features import FeatureSets
from pipeline.evaluation.knn import knn_classify
from pipeline.processes import float32_products
from pipeline.training import engine
from pipeline.training.interruption import Interrupted
from pipeline.training.metrics import read_metrics
from stages import detect, extract_teacher_features, finetune, pretrain
from tests.test_stages.conftest import ENCODER, MICRO, TEACHER, extract_config, pretrain_config, sets
from tests.test_stages.test_detect import detect_config

DEVICE = torch.device(os.environ.get("MRMAE_TEST_DEVICE", "cuda"))  # cpu: to try the tests themselves
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no GPU here"),
]
CONVVIT = {**MICRO, "name": "mrmae_convvit_small_patch16", "depth": 1}


@contextmanager
def never_waiting(monkeypatch: pytest.MonkeyPatch, first: int = 1, last: int = 2) -> Iterator[list[int]]:
    """Steps `first` to `last` of every run raise where the host waits for the device. Yields the steps watched."""
    watched: list[int] = []
    real = engine._Loop.train_step

    def step(self: Any, number: int, *rest: Any) -> None:
        watch = first <= number <= last
        if watch:
            watched.append(number)
            strictly("error")
        try:
            real(self, number, *rest)
        finally:
            if watch:
                strictly("default")

    with monkeypatch.context() as patch:
        patch.setattr(engine._Loop, "train_step", step)
        yield watched


def strictly(mode: str | int) -> None:
    """From here on "error" raises where the host waits for the device; "default" lets it wait."""
    if DEVICE.type == "cuda":
        with warnings.catch_warnings():
            # It warns, once a process, that it may miss some waits. As an error that would leave the mode on.
            warnings.simplefilter("ignore", UserWarning)
            torch.cuda.set_sync_debug_mode(mode)


@pytest.fixture(scope="module")
def cached(image_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu") / "cache"
    extract_teacher_features.run(extract_config(image_tree, path))
    return path


@pytest.mark.parametrize("student", [MICRO, CONVVIT], ids=["vit", "convvit"])
@pytest.mark.parametrize("lane", ["mae", "cached", "live", "clipped"])
def test_two_steps_of_pretraining_wait_for_nothing(
    image_tree: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, student: dict[str, Any], lane: str
) -> None:
    keys: dict[str, Any] = {
        "mae": {"mimic": {"objective": "mae"}, "views": {"image_size": 64}},
        "live": {"teacher": TEACHER, "views": {"image_size": 64}},
    }.get(lane, {"cache": {"path": str(cached)}})
    if lane == "clipped":
        keys |= {"optim": {"lr": 1e-3, "clip_grad": 1.0}, "accum_iter": 2, "mask": {"masks_per_sample": 2}}
    data = {"path": str(image_tree), "workers": 2}
    config = pretrain_config(tmp_path / "run", student=student, data=data, max_steps=4, log_every=100, **keys)
    with never_waiting(monkeypatch) as watched:
        pretrain.run(config)
    assert watched == [1, 2]


@pytest.mark.parametrize("ema", [None, 0.9])
def test_two_steps_of_finetuning_wait_for_nothing(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: float | None
) -> None:
    """With the augmentation of the default recipe."""
    keys = {
        **sets(colours), "output": tmp_path / "run", "student": ENCODER, "batch_size": 8, "max_steps": 4,
        "log_every": 100, "tensorboard": False, "ema": {"decay": ema},
    }  # fmt: skip
    with never_waiting(monkeypatch) as watched:
        finetune.run(finetune.FinetuneConfig.model_validate(keys))
    assert watched == [1, 2]


def test_two_steps_of_detection_wait_in_the_detector_alone(
    annotated: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There are as many proposals as there are: Mask R-CNN asks the device for their number."""
    forward = detect.Detector.forward

    def free(self: Any, *inputs: Any) -> Any:
        with relaxed():
            return forward(self, *inputs)

    with never_waiting(monkeypatch) as watched, monkeypatch.context() as patch:
        patch.setattr(engine, "peak_of", lambda _: None)
        patch.setattr(detect.Detector, "forward", free)
        # The backward of RoIAlign and of indexing by masks asks, too.
        patch.setattr(engine._Loop, "_backward", relaxed()(engine._Loop._backward))
        detect.run(detect_config(annotated, tmp_path / "out", max_steps=4, log_every=100))
    assert watched == [1, 2]


@contextmanager
def relaxed() -> Iterator[None]:
    """The host may wait for the device."""
    if DEVICE.type == "cpu":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    strictly("default")
    try:
        yield
    finally:
        strictly(mode)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_extraction_is_that_of_a_cpu(image_tree: Path, precision: str) -> None:
    """Tokens by cosine; attention by total variation. Convolutions may take TF32 in fp32 too, torch's default."""
    source, views = open_images(str(image_tree)), ViewConfig(image_size=64)
    choice = TeacherConfig.model_validate(TEACHER)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    found = []
    for device, kind in ((torch.device("cpu"), torch.float32), (DEVICE, dtype)):
        extractor = Extractor(source, views, [load_teacher(choice, device, kind)], 8, 0, "zarr")
        batch = next(iter(extractor._render_batches(range(8), views)))
        (out,) = extractor._forward(batch)
        found.append((out.tokens.float().cpu(), out.attention.float().cpu()))  # type: ignore[union-attr]
    (tokens, attention), (others, elsewhere) = found
    cosine = F.cosine_similarity(tokens, others, dim=-1)
    distance = (attention - elsewhere).abs().sum(-1).max() / 2
    assert cosine.min() > (0.9999 if precision == "fp32" else 0.97)
    assert distance < (1e-3 if precision == "fp32" else 0.05)


def test_a_cache_of_a_gpu_is_sound(cached: Path) -> None:
    reader = open_cache(cached)
    tokens = np.stack([reader.read(index, 0).tokens.astype(np.float32) for index in range(len(reader))])
    assert np.isfinite(tokens).all()
    assert tokens.std() > 0


def test_int4_packs_and_restores_as_on_a_cpu_without_waiting() -> None:
    tokens = torch.randn(16, 49, 768, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 60, 768)
    quantiser = Quantiser.calibrate("int4", tokens)
    stored, scale = quantiser.quantise(tokens)
    moved, moved_scale, moved_tokens = stored.to(DEVICE), scale.to(DEVICE), tokens.to(DEVICE)
    quantiser.dequantise(moved, moved_scale)  # puts its constants on the device
    strictly("error")
    try:
        restored, again = quantiser.dequantise(moved, moved_scale), quantiser.quantise(moved_tokens)[0]
    finally:
        strictly("default")
    expected = quantiser.dequantise(stored, scale)
    torch.testing.assert_close(restored.cpu(), expected, rtol=1e-3, atol=0.05)
    assert (again.cpu() == stored).float().mean() > 0.999  # a value beside an edge may fall on its other side


def test_codes_are_those_of_a_cpu_and_the_codebook_the_same_again() -> None:
    tokens = torch.randn(64, 49, 192, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 60, 192)
    quantiser, again = (Quantiser.calibrate("codes", tokens.to(DEVICE), clusters=64) for _ in range(2))
    assert quantiser.to_json() == again.to_json()
    stored, _ = quantiser.quantise(tokens)
    moved = tokens.to(DEVICE)
    codes, _ = quantiser.quantise(moved)  # puts its constants on the device
    strictly("error")
    try:
        codes, restored = quantiser.quantise(moved)[0], quantiser.dequantise(codes, None)
    finally:
        strictly("default")
    assert (codes.cpu() == stored).float().mean() > 0.999  # a token between two centroids may fall to the other
    torch.testing.assert_close(restored.cpu(), quantiser.dequantise(codes.cpu(), None))


@pytest.mark.filterwarnings("ignore:\\s*Online softmax is disabled:UserWarning")  # torch's compiler, of its own choice
@pytest.mark.parametrize("compiled", [False, True])
def test_a_resumed_run_has_equal_losses(image_tree: Path, cached: Path, tmp_path: Path, compiled: bool) -> None:
    """Atomic additions may come in another order: losses to 1e-3 in bf16, learning rates and samples to the bit."""
    common: dict[str, Any] = {"data": {"path": str(image_tree), "workers": 0}, "cache": {"path": str(cached)}}
    common |= {"checkpoint_every": 3, "compile": compiled}
    pretrain.run(pretrain_config(tmp_path / "whole", **common))
    real, steps = engine._Loop.train_step, []

    def cut_off(self: Any, number: int, *rest: Any) -> None:
        steps.append(number)
        if number == 4:
            raise Interrupted("cut off")
        real(self, number, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._Loop, "train_step", cut_off)
        with pytest.raises(Interrupted):
            pretrain.run(pretrain_config(tmp_path / "stopped", **common))
    pretrain.run(pretrain_config(tmp_path / "stopped", **common))
    whole, stopped = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "stopped"))
    assert [row["step"] for row in stopped] == [row["step"] for row in whole]
    assert [row["loss"] for row in stopped] == pytest.approx([row["loss"] for row in whole], rel=1e-3)
    if DEVICE.type == "cuda":
        assert all(row["mfu"] > 0 for row in whole if "lr" in row) or "mfu" not in whole[0]


def test_neighbours_are_compared_in_fp32_whatever_the_run_computes_in() -> None:
    """bf16 and TF32 would take neighbours 1e-4 apart for equal."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(1, 384, generator=generator)
    train = centre + 1e-2 * torch.randn(512, 384, generator=generator)
    labels = torch.randint(0, 16, (512,), generator=generator)
    test = train + 1e-4 * torch.randn(512, 384, generator=generator)
    sets = FeatureSets(train, labels, test, labels, 16)
    exact = knn_classify(sets, 1, device="cpu")
    assert exact["top1"] == 1
    with float32_products("high"), torch.autocast(DEVICE.type, torch.bfloat16):
        assert knn_classify(sets, 1, device=DEVICE) == exact
        assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("compiled", [False, True])
def test_two_processes_train_over_nccl_as_one_does(
    image_tree: Path, cached: Path, tmp_path: Path, compiled: bool
) -> None:
    labelled = f"{{path: {image_tree}, workers: 0}}"
    micro = ", ".join(f"{key}: {value}" for key, value in MICRO.items())
    losses = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        done = subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m",
                "cli", "pretrain", f"data={labelled}", f"cache.path={cached}", f"student={{{micro}}}",
                "optim={lr: 1e-3, warmup_epochs: 0}", "batch_size=8", "max_steps=6", "log_every=1",
                "tensorboard=false", "precision=fp32", f"compile={compiled}", f"output={output}",
                f"knn={{data: {labelled}, val: {labelled}, every: 1, k: 3}}",
            ],
            cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        losses.append([row["loss"] for row in read_metrics(output / "metrics.jsonl") if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
