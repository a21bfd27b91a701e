"""From views to tokens: what all teachers share."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pipeline.errors import TeacherError
from pipeline.teachers import Teacher, build_teacher, resize_views, run_teachers, share_backbones
from pipeline.teachers.timm_vit import TimmBackbone

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


@pytest.fixture
def teacher(shake: Callable[..., Any]) -> Callable[..., Teacher]:
    def make(mean: tuple[float, ...] = MEAN, **choices: Any) -> Teacher:
        torch.manual_seed(0)
        vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=4, num_classes=0)
        return Teacher(
            TimmBackbone(shake(vit), "t", None, mean, STD), spec="timm:t", name="t", weights="random", **choices
        )

    return make


def test_each_teacher_normalises_with_its_own_statistics(
    teacher: Callable[..., Teacher], views: Callable[..., Tensor]
) -> None:
    images = views(32)
    for mean in (MEAN, (0.1, 0.2, 0.3)):
        expected = (images / 255.0 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        torch.testing.assert_close(teacher(mean).prepare(images), expected)


def test_resize_is_exact_where_nothing_is_to_be_done_and_stays_in_range(views: Callable[..., Tensor]) -> None:
    images = views(40)
    assert torch.equal(resize_views(images, 40), images.float())
    stripes = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    stripes[..., ::2] = 255
    for size in (32, 52):
        resized = resize_views(stripes, size)
        assert resized.shape == (1, 3, size, size)
        assert resized.min() >= 0
        assert resized.max() <= 255
    flat = resize_views(torch.full((1, 3, 40, 40), 77, dtype=torch.uint8), 28)
    torch.testing.assert_close(flat, torch.full_like(flat, 77))


def test_resize_is_the_antialiased_bicubic_of_pillow(views: Callable[..., Tensor]) -> None:
    image = views(64, count=1)[0]
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((28, 28), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float()
    difference = (resize_views(image[None], 28)[0] - expected).abs()
    # Pillow rounds to whole levels after each of its two passes.
    assert difference.mean() < 0.4
    assert difference.max() < 2


def test_views_of_another_size_are_resized(teacher: Callable[..., Teacher], views: Callable[..., Tensor]) -> None:
    assert teacher()(views(48)).tokens.shape == (2, 16, 48)


@pytest.mark.parametrize("bad", [torch.zeros(2, 3, 32, 32), torch.zeros(3, 32, 32, dtype=torch.uint8)])
def test_anything_but_uint8_views_is_refused(bad: Tensor, teacher: Callable[..., Teacher]) -> None:
    with pytest.raises(TeacherError, match=r"takes uint8 RGB views \[B,3,S,S\], not"):
        teacher()(bad)


def test_frozen_and_always_in_eval_mode(teacher: Callable[..., Teacher], views: Callable[..., Tensor]) -> None:
    frozen = teacher().train()
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    tokens = frozen(views(32)).tokens
    assert not tokens.requires_grad
    # Targets of a loss: a student's gradient must pass beside them.
    student = torch.ones(48, requires_grad=True)
    torch.nn.functional.smooth_l1_loss(tokens * student, tokens).backward()
    assert student.grad is not None


def test_token_choices(teacher: Callable[..., Teacher], views: Callable[..., Tensor]) -> None:
    normed, block = teacher(), teacher(tokens="block")
    raw = block(views(32)).tokens
    torch.testing.assert_close(normed(views(32)).tokens, normed.model.norm(raw))
    blocks = [trace[:, 1:] for trace in block.trace(views(32), depth=4).blocks]
    torch.testing.assert_close(teacher(tokens="block", layers=3)(views(32)).tokens, torch.stack(blocks[1:]).mean(0))
    mean_of_normed = torch.stack([normed.model.norm(output) for output in blocks]).mean(0)
    torch.testing.assert_close(teacher(layers=4)(views(32)).tokens, mean_of_normed)
    for layer in (1, 2, 3, 4):
        chosen = teacher(tokens="block", layer=layer)(views(32))
        torch.testing.assert_close(chosen.tokens, blocks[layer - 1])
        torch.testing.assert_close(chosen.attention, normed(views(32)).attention)  # the last block's
        torch.testing.assert_close(teacher(layer=layer)(views(32)).tokens, normed.model.norm(blocks[layer - 1]))
    two = teacher(tokens="block", layer=3, layers=2)(views(32)).tokens
    torch.testing.assert_close(two, (blocks[1] + blocks[2]) / 2)


def test_attention_rows_sum_to_one(teacher: Callable[..., Teacher], views: Callable[..., Tensor]) -> None:
    _, attention, heads, _ = teacher()(views(32), heads=True)
    assert attention is not None
    assert heads is not None
    torch.testing.assert_close(attention.sum(-1), torch.ones(2))
    assert heads.shape == (2, 4, 16)
    torch.testing.assert_close(heads.mean(1) / heads.mean(1).sum(-1, keepdim=True), attention)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"tokens": "projected"}, "has no projection: choose teacher.tokens=norm or block"),
        ({"tokens": "last"}, "teacher.tokens='last': choose norm, block, projected"),
        ({"layers": 5}, r"teacher.layers=5: 't' has 4 blocks, choose 1..4"),
        ({"layers": 0}, "teacher.layers=0"),
        ({"layer": 5}, "teacher.layer=5: 't' has 4 blocks, choose 1..4"),
        ({"layer": 2, "layers": 3}, "teacher.layers=3: 't' has 2 blocks up to layer 2, choose 1..2"),
    ],
)
def test_choices_that_the_model_does_not_offer(
    choices: dict[str, Any], message: str, teacher: Callable[..., Teacher]
) -> None:
    with pytest.raises(TeacherError, match=message):
        teacher(**choices)


def test_reduced_precision_stays_close_and_returns_fp32(
    teacher: Callable[..., Teacher], views: Callable[..., Tensor]
) -> None:
    full, reduced = teacher()(views(32)), teacher(dtype=torch.bfloat16)(views(32))
    assert reduced.tokens.dtype == torch.float32
    assert reduced.attention is not None
    assert reduced.attention.dtype == torch.float32
    torch.testing.assert_close(reduced.attention.sum(-1), torch.ones(2))
    assert torch.nn.functional.cosine_similarity(full.tokens, reduced.tokens, dim=-1).min() > 0.99
    assert not torch.equal(full.tokens, reduced.tokens)


def test_identity_is_json_and_tells_choices_apart(teacher: Callable[..., Teacher]) -> None:
    choices: list[dict[str, Any]] = [
        {},
        {"tokens": "block"},
        {"layers": 2},
        {"layer": 3},
        {"dtype": torch.bfloat16},
        {"mean": STD},
    ]
    identities = [teacher(**choice).identity() for choice in choices]
    assert len({json.dumps(identity, sort_keys=True) for identity in identities}) == len(choices)
    assert json.loads(json.dumps(identities[0])) == identities[0]
    assert teacher(layer=4).identity() == identities[0]  # the last block: a cache of before says nothing of it
    assert {"weights_sha256", "resize", "libraries", "num_heads", "grid"} <= identities[0].keys()


def test_teachers_of_the_same_weights_share_one_forward(
    teacher: Callable[..., Teacher], views: Callable[..., Tensor]
) -> None:
    group = [
        teacher(), teacher(tokens="block", layers=3), teacher(mean=STD), teacher(dtype=torch.bfloat16),
        teacher(layer=1), teacher(layer=3, layers=2),
    ]  # fmt: skip
    alone = [member(views(32), heads=True) for member in group]
    assert share_backbones(group) == 3
    assert group[0].backbone is group[1].backbone
    assert group[0].backbone is not group[2].backbone
    forwards = []
    for network in {id(member.backbone): member.model for member in group}.values():
        network.patch_embed.register_forward_hook(lambda *_: forwards.append(1))
    together = run_teachers(group, views(32), heads=True)
    assert len(forwards) == 3
    for before, after in zip(alone, together, strict=True):
        for expected, tensor in zip(before, after, strict=True):
            assert torch.equal(expected, tensor)


def test_compiled_forward_says_the_same(
    teacher: Callable[..., Teacher], views: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the compiler's front half alone: what it captures is ours, the code it generates isn't."""
    compile_for_real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile_for_real(f, backend="eager", fullgraph=True))
    plain, compiled = teacher()(views(32)), teacher(compile=True)(views(32))
    torch.testing.assert_close(compiled.tokens, plain.tokens)
    torch.testing.assert_close(compiled.attention, plain.attention)


@pytest.mark.usefixtures("shallow")
def test_equal_weights_of_another_activation_are_not_shared(views: Callable[..., Tensor]) -> None:
    """QuickGELU has no parameters: the digest of the weights can't tell."""
    names = ("vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224")
    plain, quick = (build_teacher(f"timm:{name}", weights="random", image_size=32) for name in names)
    assert plain.weights_sha256 == quick.weights_sha256
    alone = [teacher(views(32)).tokens for teacher in (plain, quick)]
    assert share_backbones([plain, quick]) == 2
    together = [out.tokens for out in run_teachers([plain, quick], views(32))]
    assert not torch.equal(alone[0], alone[1])
    assert all(torch.equal(before, after) for before, after in zip(alone, together, strict=True))
