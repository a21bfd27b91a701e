"""Shards of a model and of an optimiser's state, and the way back to whole ones."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from pipeline.models import Student, build_student
from pipeline.training.sharding import blank_copy, fill, gathered, scattered, shard, whole
from tests.micro import without_key_biases

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    """A process group of one, whose share is all."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def build(**options: Any) -> Student:
    sizes = {"image_size": 64, "dim": 48, "depth": 2, "num_heads": 3}
    decoder = {"decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 2}
    torch.manual_seed(0)
    sizes["target_scale"] = 1.0  # larger gradients would ask for a wider tolerance
    return build_student("mrmae_vit_tiny_patch16", **sizes, **decoder, teachers={"t": 8}, **options)


def step(student: Student, optimizer: torch.optim.Optimizer, bf16: bool) -> Tensor:
    cells = torch.arange(16).expand(2, 16)
    numbers = torch.Generator().manual_seed(0)
    images, targets = torch.randn(2, 3, 64, 64, generator=numbers), torch.randn(2, 4, 8, generator=numbers)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss: Tensor = student(images, cells[:, :4], {"t": targets}, cells[:, 4:8])["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"gradient_checkpointing": True}, {"predict_share": 0.25}, {"decoder": "cross"}]
)
def test_a_sharded_student_trains_as_a_whole_one_and_its_state_goes_both_ways(
    options: dict[str, Any], bf16: bool
) -> None:
    plain, sharded = build(**options), build(**options)
    names = [name for name, _ in sharded.named_parameters()]
    shard(sharded, CPU, bf16)
    assert [name for name, _ in sharded.named_parameters()] == names
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    models = plain, sharded
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-3, fused=True) for model in models]
    losses = [
        [step(model, optimizer, bf16) for _ in range(2)] for model, optimizer in zip(models, optimizers, strict=True)
    ]
    torch.testing.assert_close(losses[0], losses[1])

    state = gathered(sharded.state_dict(), keep=True)
    assert list(state) == list(plain.state_dict())
    torch.testing.assert_close(without_key_biases(state), without_key_biases(plain.state_dict()))
    moments = gathered(optimizers[1].state_dict(), keep=True)
    torch.testing.assert_close(moments["state"], optimizers[0].state_dict()["state"])
    assert moments["param_groups"] == optimizers[0].state_dict()["param_groups"]

    fresh = torch.optim.AdamW(sharded.parameters(), 1e-3, fused=True)
    fresh.load_state_dict(scattered(moments, fresh))
    assert isinstance(fresh.state[sharded.encoder.blocks[0].norm1.weight]["exp_avg"], DTensor)  # type: ignore[index]
    torch.testing.assert_close(gathered(fresh.state_dict(), keep=True)["state"], moments["state"], rtol=0, atol=0)


def test_who_keeps_nothing_takes_part_and_gets_none() -> None:
    student = build()
    shard(student, CPU, bf16=False)
    state = gathered({"state": [student.encoder.norm.weight, torch.ones(1)], "step": 3}, keep=False)
    assert state == {"state": [None, torch.ones(1)], "step": 3}


def test_a_blank_copy_is_filled_with_whole_weights_and_buffers() -> None:
    student = build(target_norm="channel")
    blank = blank_copy(student)
    assert {tensor.device.type for tensor in (*blank.parameters(), *blank.buffers())} == {"meta"}
    shard(student, CPU, bf16=False)
    student.set_channel_stats("t", torch.full((8,), 2.0), torch.full((8,), 3.0))
    with torch.no_grad():
        filled: Any = fill(blank, student, CPU)
    for (name, tensor), source in zip(filled.named_parameters(), student.parameters(), strict=True):
        assert torch.equal(tensor, whole(source)), name
    assert torch.equal(filled.get_buffer("mimic.t.channel_mean"), torch.full((8,), 2.0))
    images = torch.ones(1, 3, 64, 64)
    torch.testing.assert_close(filled.encoder.forward_tokens(images), build().encoder.forward_tokens(images))
