"""What a student takes on a GPU, beside what `plan` computes, and blocks that are gathered in bf16."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, distributed
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.assembly.memory import step_memory
from pipeline.models import Student, build_student
from pipeline.training.sharding import shard

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
IMAGES = 64


def build() -> Student:
    torch.manual_seed(0)
    return build_student("mrmae_vit_base_patch16", teachers={"t": 768})


def loss_of(student: Student) -> Tensor:
    """Of a step of `IMAGES` images, after its backward."""
    cells = torch.arange(196, device=CUDA).expand(IMAGES, 196)
    numbers = torch.Generator(CUDA).manual_seed(0)
    images = torch.randn(IMAGES, 3, 224, 224, device=CUDA, generator=numbers)
    targets = torch.randn(IMAGES, 49, 768, device=CUDA, generator=numbers)
    with torch.autocast("cuda", torch.bfloat16):
        loss: Tensor = student(images, cells[:, :49], {"t": targets}, cells[:, 49:])["loss"]
    loss.backward()
    return loss.detach()


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("nccl", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_a_plan_knows_what_a_step_takes() -> None:
    with FakeTensorMode():
        computed = step_memory(build(), IMAGES, 0.75, True, 1, False)
    student = build().to(CUDA)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - computed.weights
    loss_of(student)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken + computed.optimizer == pytest.approx(computed.peak, rel=0.1)


def test_sharded_blocks_are_gathered_in_bf16_and_give_the_same_loss(one_process: None) -> None:
    plain, sharded = build().to(CUDA), build().to(CUDA)
    shard(sharded, CUDA, bf16=True)
    seen: list[torch.dtype] = []
    sharded.encoder.blocks[0].norm1.register_forward_pre_hook(lambda norm, _: seen.append(norm.weight.dtype))
    losses = loss_of(plain), loss_of(sharded)
    assert seen == [torch.bfloat16]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)
    gradients = [model.encoder.blocks[0].attn.qkv.weight.grad for model in (plain, sharded)]  # type: ignore[union-attr]
    assert gradients[1].dtype == torch.float32  # type: ignore[union-attr]
    assert torch.cosine_similarity(gradients[0].flatten(), gradients[1].full_tensor().flatten(), 0) > 0.999  # type: ignore[union-attr]
