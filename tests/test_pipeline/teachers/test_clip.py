"""open_clip's towers: against open_clip's own forward, and the attention matrix that torch itself returns."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import LayerNorm, QuickGELU, VisionTransformer
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import TeacherError
from pipeline.teachers import Teacher, build_teacher
from pipeline.teachers.clip import ClipBackbone
from pipeline.teachers.registry import meta_device

HALF = (0.5, 0.5, 0.5)
TINY = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 3, "heads": 4, "mlp_ratio": 4.0, "output_dim": 24}


def own_map(visual: Any, pixels: Tensor) -> Tensor:
    """The last block's softmax map [B,H,N,N] as torch's MultiheadAttention returns it."""
    caught: list[Tensor] = []
    last = visual.transformer.resblocks[-1]
    handle = last.ln_1.register_forward_hook(lambda _module, _args, output: caught.append(output))
    with torch.no_grad():
        visual(pixels)
        handle.remove()
        _, weights = last.attn(caught[0], caught[0], caught[0], need_weights=True, average_attn_weights=False)
    return weights


def teacher_of(visual: Any, image_size: int | None = None, **choices: Any) -> Teacher:
    return Teacher(
        ClipBackbone(visual, "test", image_size, HALF, HALF), spec="test", name="test", weights="random", **choices
    )


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(("spec", "size"), [("clip_vitb16", 224), ("clip_vitb16", 160), ("clip_vitl14", 196)])
def test_equals_open_clip_with_its_own_attention(
    spec: str, size: int, views: Callable[..., Tensor], shake: Callable[..., Any], tmp_path: Path
) -> None:
    """OpenAI's ViTs as open_clip builds them for that size, weights through a file, both towers in it."""
    patch = {"clip_vitb16": 16, "clip_vitl14": 14}[spec]
    config = open_clip.get_model_config(f"ViT-{spec[-3].upper()}-{patch}-quickgelu")
    text = {**config["text_cfg"], "layers": 1, "vocab_size": 64}
    model = shake(open_clip.CLIP(config["embed_dim"], config["vision_cfg"], text, quick_gelu=True))
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "clip.safetensors")
    reference = open_clip.CLIP(config["embed_dim"], {**config["vision_cfg"], "image_size": size}, text, quick_gelu=True)
    open_clip.load_checkpoint(reference, str(tmp_path / "clip.safetensors"))
    visual: Any = reference.visual.eval()
    visual.output_tokens = True

    teacher = build_teacher(spec, weights=tmp_path / "clip.safetensors", image_size=size)
    images = views(size, count=1)
    output = teacher(images)
    mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
    pixels = (images / 255.0 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        embedding, tokens = visual(pixels)
        (block,) = teacher.trace(images).blocks
        projected = teacher.backbone.project(teacher.backbone.norm(block))
    row = own_map(visual, pixels)[:, :, 0, 1:].mean(1)
    assert output.attention is not None
    assert teacher.grid == (size // patch, size // patch)
    torch.testing.assert_close(output.tokens, tokens, atol=1e-5, rtol=0)
    torch.testing.assert_close(projected[:, 0], embedding, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.attention, row / row.sum(-1, keepdim=True), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("spec", ["clip_vitb16", "open_clip:ViT-B-16:openai", "open_clip:ViT-B-16-quickgelu:openai"])
def test_openai_weights_get_quickgelu_however_they_are_named(spec: str) -> None:
    with meta_device():
        model = build_teacher(spec, weights="random", device="meta").model
    assert {type(m) for m in model.modules() if "GELU" in type(m).__name__} == {QuickGELU}


@pytest.mark.usefixtures("shallow")
def test_other_weights_keep_gelu() -> None:
    with meta_device():
        model = build_teacher("open_clip:ViT-B-32:laion2b_e16", weights="random", device="meta").model
    assert {type(m) for m in model.modules() if "GELU" in type(m).__name__} == {nn.GELU}


@pytest.mark.parametrize("options", [{"ls_init_value": 0.1}, {"no_ln_pre": True}, {"final_ln_after_pool": True}])
def test_variants_of_the_tower(
    options: dict[str, Any], views: Callable[..., Tensor], shake: Callable[..., Any]
) -> None:
    visual = shake(VisionTransformer(**TINY, **options))
    teacher = teacher_of(visual)
    output = teacher(views(32))
    row = own_map(visual, teacher.prepare(views(32)))[:, :, 0, 1:].mean(1)
    assert output.attention is not None
    torch.testing.assert_close(output.attention, row / row.sum(-1, keepdim=True))


def test_normed_queries_and_keys(
    views: Callable[..., Tensor], shake: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    visual = shake(VisionTransformer(**TINY, qk_norm=True, norm_layer=partial(LayerNorm, eps=1e-5)))
    teacher = teacher_of(visual)
    maps: list[Tensor] = []

    def plain_attention(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        maps.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))
        return maps[-1] @ v

    monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)
    attention = teacher(views(32)).attention
    row = maps[-1][:, :, 0, 1:].mean(1)
    assert attention is not None
    torch.testing.assert_close(attention, row / row.sum(-1, keepdim=True))


@pytest.mark.parametrize("options", [{"pool_type": "avg"}, {"scaled_cosine_attn": True}])
def test_towers_without_a_row_to_trust_have_no_attention(options: dict[str, Any]) -> None:
    """A mean-pooled tower never reads its class token; scaled cosine attention isn't the formula used here."""
    assert not teacher_of(VisionTransformer(**TINY, **options)).has_attention


def test_attention_pooled_towers_norm_tokens_as_the_pool_does(views: Callable[..., Tensor]) -> None:
    visual = VisionTransformer(**TINY, attentional_pool=True, attn_pooler_heads=4, attn_pooler_queries=5)
    nn.init.normal_(visual.attn_pool.ln_k.weight)
    teacher, raw = teacher_of(visual), teacher_of(visual, tokens="block")
    torch.testing.assert_close(teacher(views(32)).tokens, visual.attn_pool.ln_k(raw(views(32)).tokens))
    with pytest.raises(TeacherError, match="has no projection"):
        teacher_of(visual, tokens="projected")


@pytest.mark.usefixtures("shallow")
def test_towers_that_open_clip_takes_from_timm(views: Callable[..., Tensor]) -> None:
    siglip = build_teacher("open_clip:ViT-B-16-SigLIP:webli", weights="random", image_size=64)
    assert (siglip.grid, siglip.backbone.mean, siglip.has_attention) == ((4, 4), (0.5, 0.5, 0.5), True)
    assert siglip(views(64)).tokens.shape == (2, 16, 768)
    eva = build_teacher("open_clip:EVA02-B-16:merged2b_s8b_b131k", weights="random", image_size=64, tokens="projected")
    assert eva(views(64)).tokens.shape == (2, 16, eva.dim) == (2, 16, 512)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("open_clip:ViT-B16:openai", "no architecture 'ViT-B16': did you mean .*ViT-B-16"),
        ("open_clip:ViT-B-16", "no weights '' of ViT-B-16: choose open_clip:<one of ViT-B-16:openai"),
        ("open_clip:ViT-B-16:opnai", "no weights 'opnai' of ViT-B-16"),
        ("open_clip:RN50:openai", "has no ViT as its vision tower"),
        ("open_clip:qqq:openai", r"open_clip.list_models\(\) lists"),
    ],
)
def test_unknown_towers_say_what_there_is(spec: str, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        build_teacher(spec, weights="random")


def test_offline_says_what_to_fetch_and_which_key_takes_it() -> None:
    with pytest.raises(TeacherError) as caught:
        build_teacher("clip_vitb16")
    message = str(caught.value)
    assert "open_clip_model.safetensors of timm/vit_base_patch16_clip_224.openai" in message
    assert "teacher.weights=FILE" in message
    assert "\n" not in message


@pytest.mark.usefixtures("shallow")
def test_a_file_of_the_vision_tower_alone_is_enough(tmp_path: Path) -> None:
    teacher = build_teacher("clip_vitb16", weights="random")
    save_file(
        {key: value.contiguous() for key, value in teacher.model.state_dict().items()}, tmp_path / "v.safetensors"
    )
    again = build_teacher("clip_vitb16", weights=tmp_path / "v.safetensors")
    assert again.weights_sha256 == teacher.weights_sha256


@pytest.mark.usefixtures("shallow")
def test_a_projection_beside_the_trunk_is_part_of_the_digest() -> None:
    name = "open_clip:ViT-B-16-SigLIP:webli"
    teachers = [build_teacher(name, weights="random", image_size=64) for _ in range(2)]
    for number, teacher in enumerate(teachers):
        backbone: Any = teacher.backbone
        backbone.projection = torch.nn.Linear(768, 8)
        torch.nn.init.constant_(backbone.projection.weight, number)
        torch.nn.init.zeros_(backbone.projection.bias)
    assert teachers[0].weights_sha256 != teachers[1].weights_sha256


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("name", ["ViT-S-32", "ViT-S-32-alt"])
def test_an_architecture_without_weights_of_its_own_takes_a_local_file(name: str, tmp_path: Path) -> None:
    teacher = build_teacher(f"open_clip:{name}", weights="random", image_size=64)
    save_file({f"visual.{key}": value for key, value in teacher.model.state_dict().items()}, tmp_path / "v.safetensors")
    assert teacher.backbone.mean == open_clip.OPENAI_DATASET_MEAN
    with pytest.raises(TeacherError, match="doesn't fit"):  # these positions are of another input
        build_teacher(f"open_clip:{name}", weights=tmp_path / "v.safetensors")
    with pytest.raises(TeacherError, match=f"no weights of {name}: give open_clip:{name} and teacher.weights=FILE"):
        build_teacher(f"open_clip:{name}")


@pytest.mark.usefixtures("shallow")
def test_a_tower_without_its_projection_gives_all_but_projected_tokens(
    views: Callable[..., Tensor], tmp_path: Path
) -> None:
    whole = build_teacher("open_clip:ViT-S-32", weights="random")
    state = {key: value for key, value in whole.model.state_dict().items() if key != "proj"}
    save_file(state, tmp_path / "v.safetensors")
    teacher = build_teacher("open_clip:ViT-S-32", weights=tmp_path / "v.safetensors")
    torch.testing.assert_close(teacher(views(224)).tokens, whole(views(224)).tokens)
    with pytest.raises(TeacherError, match="has no projection"):
        build_teacher("open_clip:ViT-S-32", weights=tmp_path / "v.safetensors", tokens="projected")


@pytest.mark.usefixtures("shallow")
def test_resampled_positions_leave_the_digest_as_it_is() -> None:
    native, small = (build_teacher("open_clip:ViT-S-32", weights="random", image_size=size) for size in (None, 64))
    assert native.weights_sha256 == small.weights_sha256
