"""A student as teacher: any module that keeps the `PatchEncoder` protocol."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pipeline.errors import TeacherError
from pipeline.pixels import IMAGENET_MEAN, IMAGENET_STD
from pipeline.teachers import build_teacher


class Encoder(nn.Module):
    """The least that is a `PatchEncoder`."""

    dim, grid, image_size = 48, (4, 4), (32, 32)

    def __init__(self, query: str, prefix: int) -> None:
        super().__init__()
        self.attention_query, self.num_prefix_tokens = query, prefix
        self.embed = nn.Conv2d(3, 48, 8, 8)
        self.prefix = nn.Parameter(torch.randn(1, prefix, 48))
        self.blocks = nn.ModuleList(Block(48, 4, qkv_bias=True) for _ in range(3))
        self.norm = nn.LayerNorm(48)

    def forward_tokens(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, self.num_prefix_tokens :]


@pytest.fixture
def encoder(shake: Callable[..., Any]) -> Callable[[str, int], Any]:
    return lambda query, prefix: shake(Encoder(query, prefix))


def full_map(encoder: Encoder, pixels: Tensor) -> Tensor:
    caught: list[Tensor] = []
    attn = encoder.blocks[-1].attn
    attn.fused_attn = False
    handle = attn.attn_drop.register_forward_pre_hook(lambda _module, args: caught.append(args[0]))
    with torch.no_grad():
        encoder.forward_tokens(pixels)
    handle.remove()
    return caught[0]


@pytest.mark.parametrize(("query", "prefix"), [("cls", 1), ("mean", 0), ("mean", 1)])
def test_tokens_and_attention(
    query: str, prefix: int, encoder: Callable[[str, int], Any], views: Callable[..., Tensor]
) -> None:
    module = encoder(query, prefix)
    teacher = build_teacher("mrmae:runs/a/last.safetensors", module=module)
    output = teacher(views(32))
    pixels = (views(32) / 255.0 - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(output.tokens, module.forward_tokens(pixels))
        module.num_prefix_tokens = 0  # with what comes before the patches
        assert (output.summary is not None) == (query == "cls")
        if output.summary is not None:
            torch.testing.assert_close(output.summary, module.forward_tokens(pixels)[:, :1])
        module.num_prefix_tokens = prefix
    rows = full_map(module, pixels)[..., prefix:]
    row = (rows[:, :, 0] if query == "cls" else rows[:, :, prefix:].mean(2)).mean(1)
    assert output.attention is not None
    torch.testing.assert_close(output.attention, row / row.sum(-1, keepdim=True))


def test_mean_row_in_chunks_of_queries(
    encoder: Callable[[str, int], Any], views: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = build_teacher("mrmae:a", module=encoder("mean", 0))
    whole = teacher(views(32)).attention
    monkeypatch.setattr("pipeline.teachers.attention.QUERY_CHUNK", 5)
    chunked = teacher(views(32)).attention
    assert whole is not None
    assert chunked is not None
    torch.testing.assert_close(chunked, whole)


def test_raw_blocks_and_their_mean(encoder: Callable[[str, int], Any], views: Callable[..., Tensor]) -> None:
    module = encoder("cls", 1)
    outputs: list[Tensor] = []
    teacher = build_teacher("mrmae:a", module=module, tokens="block", layers=2)
    for block in module.blocks:
        block.register_forward_hook(lambda _module, _args, output: outputs.append(output[:, 1:]))
    tokens = teacher(views(32)).tokens
    torch.testing.assert_close(tokens, (outputs[1] + outputs[2]) / 2)
    assert len(outputs) == 3


def test_nothing_to_focus_by(encoder: Callable[[str, int], Any], views: Callable[..., Tensor]) -> None:
    teacher = build_teacher("mrmae:a", module=encoder("none", 0))
    assert not teacher.has_attention
    assert teacher(views(32)).attention is None


def test_identity_and_cost(encoder: Callable[[str, int], Any]) -> None:
    teacher = build_teacher("mrmae:runs/a/last.safetensors", module=encoder("cls", 1))
    identity = teacher.identity()
    assert (teacher.name, identity["weights"], identity["grid"]) == ("last", "last.safetensors", [4, 4])
    by_hand = 16 * 3 * 64 * 48 + 3 * (17 * 12 * 48 * 48 + 2 * 17 * 17 * 48)
    assert teacher.gmacs == pytest.approx(by_hand / 1e9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs its module"),
        ({"module": nn.Linear(2, 2)}, "Linear lacks blocks, .*forward_tokens"),
        ({"module": Encoder("cls", 1), "image_size": 64}, "was built for image_size=32, not 64"),
        ({"module": Encoder("cls", 1), "weights": "x.safetensors"}, "leave teacher.weights out"),
        ({"module": Encoder("cls", 1), "tokens": "projected"}, "has no projection"),
    ],
)
def test_what_cannot_be_a_teacher(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        build_teacher("mrmae:a", **options)


def test_means_of_normed_blocks_are_refused_when_the_teacher_is_built(encoder: Callable[[str, int], Any]) -> None:
    with pytest.raises(TeacherError, match=r"teacher.layers=1, or teacher.tokens=block"):
        build_teacher("mrmae:a", module=encoder("cls", 1), layers=2)
