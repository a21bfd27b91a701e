"""The memory that `plan` computes for a step, beside what torch reports of a step that is run."""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from pipeline.assembly.memory import step_memory
from pipeline.errors import ConfigError
from pipeline.models import Student, build_student
from pipeline.training.sharding import shard
from stages import plan

pytestmark = pytest.mark.usefixtures("one_thread")

PROCESSES = 8


def small(name: str = "mrmae_vit_tiny_patch16", **options: Any) -> Student:
    return build_student(name, image_size=64, depth=6, decoder_dim=96, decoder_heads=4, teachers={"t.1": 64}, **options)


def peak_of_a_step(student: Student, images: int) -> int:
    """Bytes beside the weights, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        views, cells = torch.zeros(images, 3, 64, 64), torch.arange(16).expand(images, 16)
        losses = student(views, cells[:, :4], {"t.1": torch.zeros(images, 4, 64)}, cells[:, 4:])
        losses["loss"].backward()
    events: Any = profiler.profiler
    return max(accumulate(event.nbytes() for event in events.kineto_results.events() if event.name() == "[memory]"))


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")  # of torch 2.11, about what is not used
@pytest.mark.parametrize("images", [2, 64])
@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("mrmae_vit_tiny_patch16", False), ("mrmae_vit_tiny_patch16", True), ("mrmae_convvit_small_patch16", False)],
)
def test_peak_is_what_the_profiler_saw(name: str, checkpointing: bool, images: int) -> None:
    with FakeTensorMode():
        computed = step_memory(small(name, gradient_checkpointing=checkpointing), images, 0.75, False, 1, False)
    student = small(name, gradient_checkpointing=checkpointing)
    assert computed.weights + computed.optimizer + peak_of_a_step(student, images) == pytest.approx(
        computed.peak, rel=0.1
    )
    assert computed.peak <= sum(computed[:-1])


@pytest.fixture
def many_processes() -> Iterator[None]:
    """A process group of which only this process is there: what others send has no data."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=PROCESSES)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("images", [2, 64])
def test_peak_of_a_share_is_what_a_sharded_step_takes(many_processes: None, images: int) -> None:
    with FakeTensorMode():
        computed = step_memory(small(), images, 0.75, False, PROCESSES, True)
    student = small()
    shard(student, torch.device("cpu"), bf16=False)
    assert computed.weights + computed.optimizer + peak_of_a_step(student, images) == pytest.approx(
        computed.peak, rel=0.1
    )


def test_plan_tells_the_memory_of_a_gpu() -> None:
    keys = {"student": "mrmae_vit_tiny_patch16", "batch_size": 64}
    whole, part = (
        plan.run(plan.PlanConfig.model_validate({**keys, "gpus": 8, "sharding": sharding}))
        for sharding in ("ddp", "fsdp")
    )
    assert whole["gpu_images"] == part["gpu_images"] == 8
    assert [whole[f"gpu_{name}"] for name in ("weights", "gradients", "optimizer", "gathered")] == [
        "30.7 MB", "60.8 MB", "60.8 MB", "0 B",
    ]  # fmt: skip
    assert [part[f"gpu_{name}"] for name in ("weights", "gradients", "optimizer")] == ["3.838 MB", "3.8 MB", "7.6 MB"]
    assert part["gpu_memory_bytes"] < whole["gpu_memory_bytes"]
    with pytest.raises(ConfigError, match="batch_size=64 is no multiple of gpus=7"):
        plan.run(plan.PlanConfig.model_validate({**keys, "gpus": 7}))
