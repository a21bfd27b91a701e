"""Habits that a GPU wants, as far as a CPU can show them: collection, precision of products, mfu, DDP's buckets."""

import gc
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch._dynamo.backends.distributed import DDPOptimizer
from torch.nn.parallel import DistributedDataParallel

from pipeline.configs.training import RunConfig
from pipeline.evaluation import FeatureSets, knn
from pipeline.flop_counting import flop_counter
from pipeline.models import build_student
from pipeline.steps import StepPlan
from pipeline.training import device as device_module
from pipeline.training.device import float32_products_of, generators_of
from pipeline.training.flops import count_flops, peak_tflops
from pipeline.training.garbage import FixedCollection
from pipeline.training.metrics import Meter, read_metrics
from pipeline.training.telling import describe_step
from tests.test_pipeline.training.test_engine import Training, rows

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"image_size": 64, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
VIT: dict[str, Any] = {"dim": 48, "depth": 2, "num_heads": 3}


def test_garbage_is_collected_at_fixed_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(gc, "collect", lambda *generation: calls.append(generation))
    monkeypatch.setattr(gc, "freeze", lambda: calls.append("freeze"))
    monkeypatch.setattr(gc, "unfreeze", lambda: calls.append("unfreeze"))
    assert gc.isenabled()
    with suppress(KeyError), FixedCollection() as garbage:
        for done in range(1, 101):
            garbage.step(done)
            assert not gc.isenabled()
        with garbage.as_ever():
            assert gc.isenabled()
        assert not gc.isenabled()
        garbage.all()
        raise KeyError
    assert gc.isenabled()  # also after an error
    assert calls == ["freeze", (1,), (1,), (), "unfreeze"]


def test_steps_run_without_collection_and_evaluations_with_it(tmp_path: Path) -> None:
    seen: list[tuple[str, bool]] = []
    training = Training(tmp_path, evaluate_every=6)
    training.at_step = lambda _: seen.append(("step", gc.isenabled()))
    training.at_evaluation = lambda _: seen.append(("evaluation", gc.isenabled()))
    training()
    assert set(seen) == {("step", False), ("evaluation", True)}
    assert gc.isenabled()


def run_of(kind: str, precision: str, **keys: Any) -> Any:
    config = RunConfig.model_validate({"output": "x", **keys})
    accelerator = SimpleNamespace(mixed_precision=precision)
    identity = {"precision": precision.replace("no", "fp32")}
    return SimpleNamespace(
        device=torch.device(kind),
        accelerator=accelerator,
        config=config,
        identity=identity,
        is_main=True,
        sharded=False,
    )


@pytest.mark.parametrize(
    ("kind", "precision", "inside"), [("cuda", "bf16", "high"), ("cuda", "no", "highest"), ("cpu", "bf16", "highest")]
)
def test_products_of_fp32_are_reduced_where_bf16_is_allowed_alone(kind: str, precision: str, inside: str) -> None:
    with suppress(KeyError), float32_products_of(run_of(kind, precision)):
        assert torch.get_float32_matmul_precision() == inside
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


def test_neighbours_are_compared_exactly_in_any_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    nearest = knn._nearest

    def spy(*inputs: Any) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return nearest(*inputs)

    monkeypatch.setattr(knn, "_nearest", spy)
    features, labels = torch.eye(4), torch.arange(4)
    with float32_products_of(run_of("cuda", "bf16")):
        assert knn.knn_classify(FeatureSets(features, labels, features, labels, 4), 1)["top1"] == 1
    assert seen == ["highest"]


def test_few_images_a_gpu_are_told_of_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "H100")
    lines = describe_step(run_of("cuda", "bf16"), StepPlan(4, 8, 256, 2, 1))
    assert lines[0] == "device: H100; precision: bf16"
    assert "compile=true fuses them" in lines[-1]
    for run, plan in (
        (run_of("cuda", "bf16"), StepPlan(4, 8, 256, 1, 1)),
        (run_of("cpu", "no"), StepPlan(4, 8, 8, 1, 1)),
        (run_of("cuda", "bf16", compile=True), StepPlan(4, 8, 8, 1, 1)),
    ):
        assert "compile" not in "".join(describe_step(run, plan))


def test_only_the_generators_in_use_are_seeded() -> None:
    (generator,) = generators_of(CPU)
    generator.manual_seed(7)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize(
    ("card", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500), ("NVIDIA GH200 480GB", 989), ("NVIDIA L40S", 362), ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA A10", 125),
        ("NVIDIA A10G", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("Tesla T4", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)  # fmt: skip
def test_peaks_go_by_the_name_of_the_card(card: str, tflops: float | None) -> None:
    assert peak_tflops(card) == tflops


def student_and_losses(name: str, **keys: Any) -> tuple[nn.Module, Any]:
    student = build_student(name, teachers={"t": 32}, **SIZES, **keys)
    images, ids_keep = torch.rand(2, 3, 64, 64), torch.arange(4).expand(2, 4)
    return student, lambda: student(images, ids_keep, {"t": torch.rand(2, 4, 32)})


@pytest.mark.parametrize("name", ["mrmae_vit_tiny_patch16", "mrmae_convvit_small_patch16"])
def test_flops_without_data_are_those_of_a_step(name: str) -> None:
    student, losses = student_and_losses(name, **(VIT if "_vit_" in name else {}))
    state = torch.get_rng_state()
    counted = count_flops(student, losses)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in student.parameters())
    with flop_counter() as counter:
        losses()["loss"].backward()
    assert counted == counter.get_total_flops() > 0
    losses()["loss"].backward()  # nothing without data is left behind


def test_what_checkpointing_computes_again_does_not_count() -> None:
    plain, losses = student_and_losses("mrmae_vit_tiny_patch16", **VIT)
    checkpointed, same = student_and_losses("mrmae_vit_tiny_patch16", gradient_checkpointing=True, **VIT)
    assert count_flops(checkpointed, same) == count_flops(plain, losses)
    assert checkpointed.encoder.gradient_checkpointing


def test_a_forward_of_unknown_shapes_counts_three_times() -> None:
    model = nn.Linear(8, 4)
    model.dynamic_shapes = True  # type: ignore[assignment]
    assert count_flops(model, lambda: {"loss": model(torch.rand(2, 8)).sum()}) == 3 * 2 * 2 * 8 * 4


def test_rows_tell_mfu_where_a_peak_is_known_and_the_run_stays_as_it_was(tmp_path: Path) -> None:
    """12 FLOPs an image of a linear layer 3 → 2, twice that backward less the input's gradient, which nobody wants."""
    Training(tmp_path / "plain", evaluate_every=4)()
    Training(tmp_path / "with", evaluate_every=4, config={"peak_tflops": 1e-6})()
    plain, told = rows(tmp_path / "plain"), rows(tmp_path / "with")
    assert not any("mfu" in row for row in plain)
    with_rate = [row for row in told if "lr" in row]
    assert all(row.pop("mfu") > 0 for row in with_rate)
    assert told == plain
    last = "checkpoints/step-00000012/model.safetensors"
    assert (tmp_path / "plain" / last).read_bytes() == (tmp_path / "with" / last).read_bytes()


def test_mfu_is_what_it_says(tmp_path: Path) -> None:

    Training(tmp_path, config={"peak_tflops": 1e-6})()
    written = {row["step"]: row for row in read_metrics(tmp_path / "metrics.jsonl")}
    row = written[10]
    assert row["mfu"] == pytest.approx((12 + 12) * row["images_per_s"] / 1e6)
    assert row["checkpoint_s"] > 0  # those of steps 6 and 9
    assert written[1]["checkpoint_s"] == written[12]["checkpoint_s"] == 0


def test_a_card_that_is_not_known_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA X1")
    with caplog.at_level(logging.INFO, logger="pipeline"):
        assert device_module.peak_of(run_of("cuda", "bf16")) is None
        assert device_module.peak_of(run_of("cuda", "bf16", peak_tflops=2.0)) == 2e12
    assert caplog.text.count("the rate of NVIDIA X1 isn't known here; give peak_tflops=...") == 1


def test_a_meter_names_the_first_bad_micro_batch_whatever_follows() -> None:
    meter = Meter(CPU)
    for value in (1.0, 2.0):
        meter.add({"loss": torch.tensor(value), "other": torch.tensor(float("nan"))})
    meter.take()
    assert meter.first_bad() is None
    for value in (1.0, float("inf"), -float("inf"), 1.0):
        meter.add({"loss": torch.tensor(value), "other": torch.tensor(1.0), "pred": torch.zeros(2)})
    assert meter.first_bad() == 3
    assert set(meter.sums) == {"loss", "other"}


@pytest.fixture
def lone_group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("lone_group")
def test_a_model_compiled_in_place_is_cut_at_ddps_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `fit` does it: compiled first, then wrapped. Each part's gradients can be sent while the next are computed."""
    buckets: list[int] = []
    compile_fn = DDPOptimizer.compile_fn

    def spy(self: DDPOptimizer, *inputs: Any) -> Any:
        compiled = compile_fn(self, *inputs)
        buckets.append(len(self.buckets))
        return compiled

    monkeypatch.setattr(DDPOptimizer, "compile_fn", spy)
    student, _ = student_and_losses("mrmae_vit_tiny_patch16", depth=3)
    torch.compiler.reset()
    student.compile(backend="eager")
    wrapped = DistributedDataParallel(student, bucket_cap_mb=1)  # type: ignore[arg-type]
    losses = wrapped(torch.rand(2, 3, 64, 64), torch.arange(4).expand(2, 4), {"t": torch.rand(2, 4, 32)})
    losses["loss"].backward()
    torch.compiler.reset()
    assert sum(buckets) > 2
