"""timm's ViTs: against formulas written out here, and against the library's own unfused attention map."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor

from pipeline.errors import TeacherError
from pipeline.teachers import Teacher, build_teacher
from pipeline.teachers.timm_vit import TimmBackbone

HALF = (0.5, 0.5, 0.5)
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 0}


def plain_vit(state: dict[str, Tensor], x: Tensor, heads: int, size: int) -> tuple[Tensor, Tensor]:
    """A ViT from the paper's formulas (arXiv 2010.11929): patch tokens after the norm, CLS row averaged over heads.

    Pre-norm blocks, LayerNorm eps 1e-6, exact GELU; the whole attention matrix is built.
    """

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    kernel = state["patch_embed.proj.weight"]
    patch, grid = kernel.shape[-1], size // kernel.shape[-1]
    positions = state["pos_embed"]
    native = int((positions.shape[1] - 1) ** 0.5)
    if grid != native:
        maps = positions[:, 1:].reshape(1, native, native, -1).permute(0, 3, 1, 2)
        maps = F.interpolate(maps, (grid, grid), mode="bicubic", antialias=True)
        positions = torch.cat([positions[:, :1], maps.flatten(2).transpose(1, 2)], dim=1)
    cells = x.unfold(2, patch, patch).unfold(3, patch, patch)  # [B,3,g,g,p,p]
    tokens = torch.einsum("bcijuv,dcuv->bijd", cells, kernel).flatten(1, 2) + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), tokens], dim=1) + positions
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    for block in range(depth):
        b = f"blocks.{block}"
        qkv = linear(norm(x, f"{b}.norm1"), f"{b}.attn.qkv").unflatten(-1, (3, heads, -1))  # [B,N,3,H,d]
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        logits = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
        weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
        mixed = torch.einsum("bhqk,bhkd->bqhd", weights, v).flatten(2)
        x = x + linear(mixed, f"{b}.attn.proj")
        h = linear(norm(x, f"{b}.norm2"), f"{b}.mlp.fc1")
        x = x + linear(0.5 * h * (1 + torch.erf(h / 2**0.5)), f"{b}.mlp.fc2")
    row = weights[:, :, 0, 1:].mean(1)
    return norm(x, "norm")[:, 1:], row / row.sum(-1, keepdim=True)


def teacher_of(model: Any, **choices: Any) -> Teacher:
    backbone = TimmBackbone(model, "test", None, HALF, HALF)
    return Teacher(backbone, spec="timm:test", name="test", weights="random", **choices)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(
    ("spec", "heads", "size"), [("dino_vitb16", 12, 224), ("dino_vits16", 6, 160), ("dino_vitb16", 12, 160)]
)
def test_dino_equals_the_formulas(
    spec: str, heads: int, size: int, views: Callable[..., Tensor], shake: Callable[..., Any], tmp_path: Path
) -> None:
    assert_equals_formulas(spec, heads, size, views, shake, tmp_path)


def test_all_blocks_of_dino_equal_the_formulas(
    views: Callable[..., Tensor], shake: Callable[..., Any], tmp_path: Path
) -> None:
    assert_equals_formulas("dino_vits16", 6, 224, views, shake, tmp_path)


def assert_equals_formulas(
    spec: str, heads: int, size: int, views: Callable[..., Tensor], shake: Callable[..., Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    name = {"dino_vits16": "vit_small_patch16_224.dino", "dino_vitb16": "vit_base_patch16_224.dino"}[spec]
    state = shake(timm.create_model(name)).state_dict()
    save_file(state, tmp_path / "dino.safetensors")
    teacher = build_teacher(spec, weights=tmp_path / "dino.safetensors", image_size=size)
    images = views(size, count=1)
    output = teacher(images)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double().view(2, 1, 3, 1, 1)
    double = {key: value.double() for key, value in state.items()}
    tokens, attention = plain_vit(double, (images / 255.0 - mean) / std, heads, size)
    assert teacher.grid == (size // 16, size // 16)
    assert output.attention is not None
    assert (output.tokens - tokens).abs().max() <= 1e-5
    assert (output.attention - attention).abs().max() <= 1e-5
    assert attention.max() > 2 / attention.shape[1]  # the row says something, so equality does too


@pytest.mark.parametrize(
    "options",
    [
        {"reg_tokens": 4},
        {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.1},
        {"qk_norm": True},
        {"patch_size": 14, "img_size": 56},
        {"patch_size": 16, "img_size": 64, "dynamic_img_size": True},
        {"pre_norm": True, "qkv_bias": False},
    ],
    ids=["registers", "registers-layerscale", "qk-norm", "patch14", "patch16-dynamic", "pre-norm"],
)
def test_class_row_of_any_vit_equals_the_librarys_map(
    options: dict[str, Any], views: Callable[..., Tensor], shake: Callable[..., Any], full_map: Callable[..., Tensor]
) -> None:
    model = shake(VisionTransformer(**{**TINY, **options}))
    teacher = teacher_of(model)
    images = views(teacher.image_size)
    tokens, attention, heads, _ = teacher(images, heads=True)
    rows = full_map(model, teacher.prepare(images))[:, :, 0, model.num_prefix_tokens :]
    expected = rows.mean(1) / rows.mean(1).sum(-1, keepdim=True)
    with torch.no_grad():
        reference = model.forward_features(teacher.prepare(images))[:, model.num_prefix_tokens :]
    assert attention is not None
    assert heads is not None
    torch.testing.assert_close(attention, expected)
    torch.testing.assert_close(heads, rows)
    torch.testing.assert_close(tokens, reference)
    assert teacher.has_attention
    assert tokens.shape == (2, teacher.grid[0] * teacher.grid[1], teacher.dim)


ROTARY = {"use_rot_pos_emb": True, "num_reg_tokens": 2}
DINOV3 = {**ROTARY, "rope_type": "dinov3", "use_abs_pos_emb": False, "rope_rotate_half": True}
SPLIT = {"qkv_fused": False}
ROPE = {**ROTARY, "attn_type": "rope", "no_embed_class": True}  # timm's `AttentionRope`: keys have a bias
BEIT = {"init_values": 0.1, "use_abs_pos_emb": False}


@pytest.mark.parametrize(
    ("network", "options"),
    [
        pytest.param(Eva, DINOV3, id="dinov3"),
        pytest.param(Eva, {**DINOV3, "dynamic_img_size": True}, id="dinov3-dynamic"),
        pytest.param(Eva, {**DINOV3, **SPLIT}, id="dinov3-split"),
        pytest.param(Eva, {**DINOV3, **SPLIT, "dynamic_img_size": True}, id="dinov3-split-dynamic"),
        pytest.param(Eva, ROPE, id="pe"),
        pytest.param(Eva, {**ROPE, **SPLIT}, id="rope-split"),
        pytest.param(Eva, {**ROPE, "qk_norm": True, "scale_attn_inner": True}, id="rope-normed"),
        pytest.param(Eva, {**ROPE, "rope_type": "mixed"}, id="naver-mixed"),
        pytest.param(Eva, {**ROPE, **SPLIT, "qk_norm": True, "num_kv_heads": (4, 4, 2)}, id="sapiens2-grouped"),
        pytest.param(Eva, {"use_post_norm": True}, id="eva02-e"),
        pytest.param(Eva, {**ROTARY, "use_post_norm": True, "attn_type": "rope"}, id="post-norm-rope"),
        pytest.param(Beit, {**BEIT, "use_rel_pos_bias": True}, id="beit"),
        pytest.param(Beit, {**BEIT, "use_shared_rel_pos_bias": True}, id="beit-shared"),
        pytest.param(Beit, {**BEIT, "use_rel_pos_bias": True, "use_shared_rel_pos_bias": True}, id="beit-both"),
        pytest.param(Beit, {"qkv_bias": False}, id="beit-without-biases"),
        pytest.param(VisionTransformerRelPos, {"class_token": True}, id="relative-mlp"),
        pytest.param(VisionTransformerRelPos, {"class_token": True, "rel_pos_type": "bias"}, id="relative-table"),
        pytest.param(VisionTransformerRelPos, {"class_token": True, "shared_rel_pos": True}, id="relative-shared"),
    ],
)
def test_class_row_with_positions_in_the_attention_equals_the_librarys_map(
    network: Callable[..., Any],
    options: dict[str, Any],
    views: Callable[..., Tensor],
    shake: Callable[..., Any],
    full_map: Callable[..., Tensor],
) -> None:
    model = shake(network(**{**TINY, "embed_dim": 64}, **options))
    teacher = teacher_of(model)
    images = views(32)
    output = teacher(images)
    rows = full_map(model, teacher.prepare(images))[:, :, 0, model.num_prefix_tokens :].mean(1)
    assert output.attention is not None
    torch.testing.assert_close(output.attention, rows / rows.sum(-1, keepdim=True), atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"reg_tokens": 2, "pool_include_prefix": True}])
def test_no_class_token_focuses_by_the_pooling_head(
    options: dict[str, Any], views: Callable[..., Tensor], shake: Callable[..., Any]
) -> None:
    model = shake(VisionTransformer(**TINY, **options, class_token=False, global_pool="map"))
    teacher = teacher_of(model)
    images = views(32)
    output = teacher(images)
    with torch.no_grad():
        normed = model.forward_features(teacher.prepare(images))
        seen = normed if model.pool_include_prefix else normed[:, model.num_prefix_tokens :]
        pool = model.attn_pool
        key, value = pool.kv(seen).unflatten(-1, (2, 4, 12)).permute(2, 0, 3, 1, 4)
        query = pool.q(pool.latent).unflatten(-1, (4, 12)).transpose(1, 2)
        weights = (query @ key.mT / 12**0.5).softmax(-1)
        # The library's own pooled vector comes from these weights, so they are the pooling attention.
        pooled = pool.proj((weights @ value).transpose(1, 2).flatten(2))
        torch.testing.assert_close((pooled + pool.mlp(pool.norm(pooled)))[:, 0], pool(seen))
    row = weights[:, :, 0].mean(1)[:, -16:]
    assert output.attention is not None
    torch.testing.assert_close(output.attention, row / row.sum(-1, keepdim=True))


def test_nothing_to_focus_by(views: Callable[..., Tensor]) -> None:
    teacher = teacher_of(VisionTransformer(**TINY, class_token=False, global_pool="avg"))
    output = teacher(views(32), heads=True)
    assert not teacher.has_attention
    assert output.attention is None
    assert output.attention_heads is None
    assert output.tokens.shape == (2, 16, 48)


def test_mean_pooled_models_keep_their_norm_behind_the_pooling(views: Callable[..., Tensor]) -> None:
    model = VisionTransformer(**TINY, class_token=True, global_pool="avg")
    torch.nn.init.normal_(model.fc_norm.weight)
    teacher, raw = teacher_of(model), teacher_of(model, tokens="block")
    expected = F.layer_norm(raw(views(32)).tokens, (48,), model.fc_norm.weight, model.fc_norm.bias, 1e-6)
    torch.testing.assert_close(teacher(views(32)).tokens, expected)


def test_natively_oblong_positions_take_a_square_size(views: Callable[..., Tensor]) -> None:
    oblong = VisionTransformer(**{**TINY, "img_size": (32, 48)})
    with pytest.raises(TeacherError, match=r"sees 32x48 and views are square: give image_size"):
        TimmBackbone(oblong, "test", None, HALF, HALF)
    teacher = Teacher(TimmBackbone(oblong, "test", 40, HALF, HALF), spec="timm:test", name="test", weights="random")
    assert teacher.grid == (5, 5)
    assert teacher(views(40)).tokens.shape == (2, 25, 48)


def test_size_that_patches_do_not_divide() -> None:
    with pytest.raises(TeacherError, match=r"image_size=200 is no multiple of its 16-pixel patch"):
        build_teacher("dino_vits16", weights="random", image_size=200)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("vit_smal_patch16_224.dino", "vit_small_patch16_224.dino"),
        ("vit_small_patch16_224.dinoo", "vit_small_patch16_224.dino"),
        ("qqq", "list_models"),
    ],
)
def test_unknown_models_list_near_names(name: str, hint: str) -> None:
    with pytest.raises(TeacherError, match=f"timm has no model '{name}': .*{hint}"):
        build_teacher(f"timm:{name}", weights="random")


def test_convolutional_models_are_no_teachers() -> None:
    with pytest.raises(TeacherError, match="no plain ViT with patch tokens"):
        build_teacher("timm:resnet18", weights="random")


@pytest.mark.usefixtures("shallow")
def test_original_releases_load_too(views: Callable[..., Tensor], tmp_path: Path) -> None:
    """DINOv2's own files carry a mask token that timm's model lacks; timm's renaming is applied to local files."""
    state = timm.create_model("vit_small_patch14_dinov2.lvd142m", num_classes=0).state_dict()
    torch.save({**state, "mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2.pth")
    teacher = build_teacher("dinov2_vits14", weights=tmp_path / "dinov2.pth")
    assert (teacher.grid, teacher.dim) == ((14, 14), 384)
    assert teacher(views(224, count=1)).tokens.shape == (1, 196, 384)


def test_offline_says_what_to_fetch_and_which_key_takes_it() -> None:
    with pytest.raises(TeacherError) as caught:
        build_teacher("dino_vits16")
    message = str(caught.value)
    assert "model.safetensors of timm/vit_small_patch16_224.dino" in message
    assert "teacher.weights=FILE" in message
    assert "\n" not in message


def test_untrained_architectures_say_so() -> None:
    with pytest.raises(TeacherError, match=r"has no public weights: give teacher.weights=FILE"):
        build_teacher("timm:vit_small_patch16_36x1_224")
