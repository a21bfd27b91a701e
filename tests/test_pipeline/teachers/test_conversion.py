"""timm's filters without what they forgive: shapes come from the meta device, values only where they matter."""

import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from pipeline.errors import TeacherError
from pipeline.teachers import build_teacher
from pipeline.teachers.conversion import Converted, to_timm
from pipeline.weights import state_digest

State = dict[str, Tensor]
DINO = "vit_small_patch16_224.dino"
DINOV3 = "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m"


def empty(name: str, **options: Any) -> Any:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=0, **options)


def converted(state: State, name: str) -> Converted:
    return to_timm(state, empty(name), name, "file")


def fits(state: State, name: str) -> bool:
    own = empty(name).state_dict()
    return {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in own.items()}


def meta(shapes: dict[str, tuple[int, ...]]) -> State:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize(("other", "patch"), [("vit_small_patch8_224", 8), ("vit_small_patch32_224", 32)])
def test_another_patch_size_is_refused(other: str, patch: int) -> None:
    with pytest.raises(TeacherError, match=rf"has {patch}-pixel patches .* where timm:{DINO} has 16: choose"):
        converted(empty(other).state_dict(), DINO)


def test_positions_of_another_grid_are_resampled_and_announced(caplog: pytest.LogCaptureFixture) -> None:
    state = empty("vit_small_patch16_384").state_dict() | {"pos_embed": torch.randn(1, 577, 384)}
    found = converted(state, DINO)
    expected = resample_abs_pos_embed(state["pos_embed"], [14, 14], [24, 24])
    assert torch.equal(found.state["pos_embed"], expected)
    assert found.native.keys() == {"pos_embed"}
    assert found.native["pos_embed"] is state["pos_embed"]
    assert "positions of a 24x24 grid were resampled to the model's 14x14" in caplog.text


def test_a_file_that_fits_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        found = converted(empty(DINO).state_dict(), DINO)
    assert fits(found.state, DINO)
    assert found.native == {}
    assert caplog.text == ""


def dinov3(query: float = 0, key: float = 0, value: float = 0, masked: bool = True) -> State:
    """Names and shapes of Meta's release of DINOv3, at the size of timm's ViT-Ti; two registers' worth of detail."""
    own = empty(DINOV3).state_dict()
    dim = own["cls_token"].shape[-1]
    state = {k: v for k, v in own.items() if not k.endswith(("q_bias", "v_bias"))}
    names = {"reg_token": "storage_tokens"} | {k: k.replace("gamma_", "ls") + ".gamma" for k in state if "gamma_" in k}
    state = {names.get(k, k): v for k, v in state.items()}
    for block in range(12):
        bias = torch.tensor([query, key, value]).repeat_interleave(dim)
        state[f"blocks.{block}.attn.qkv.bias"] = bias
        if masked:
            state[f"blocks.{block}.attn.qkv.bias_mask"] = torch.tensor([1.0, 0, 1]).repeat_interleave(dim)
    return state | {"mask_token": torch.ones(1, dim), "rope_embed.periods": torch.ones(16)}


def test_dinov3s_biases_find_their_place(capsys: pytest.CaptureFixture[str]) -> None:
    found = converted(dinov3(query=1, key=7, value=2), DINOV3).state
    assert fits(found, DINOV3)
    assert found["blocks.3.attn.q_bias"].eq(1).all()
    assert found["blocks.3.attn.v_bias"].eq(2).all()
    assert capsys.readouterr().out == ""


def test_dinov3s_biases_are_never_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    plain = "vit_small_patch16_dinov3.lvd1689m"
    model = empty(DINOV3, qkv_bias=False)
    assert not any("bias" in key for key in to_timm(dinov3(), model, plain, "f").state if "attn.q" in key)
    with pytest.raises(TeacherError, match=r"would leave away: choose timm:vit_small_patch16_dinov3_qkvb.lvd1689m"):
        to_timm(dinov3(value=1), model, plain, "f")
    with pytest.raises(TeacherError, match=r"biases of keys .* no place for"):
        converted(dinov3(key=1, masked=False), DINOV3)
    assert capsys.readouterr().out == ""


def test_what_timms_filter_would_drop_is_refused_unless_it_is_zero() -> None:
    state = empty("eva02_tiny_patch14_224").state_dict()
    state = {f"visual.{key}": value for key, value in state.items() if key != "pos_embed"}
    state |= {"visual.pos_embed": empty("eva02_tiny_patch14_224").pos_embed, "transformer.x": torch.ones(1)}
    assert fits(converted(state, "eva02_tiny_patch14_224").state, "eva02_tiny_patch14_224")  # another tower's is free
    rope = "blocks.0.europe.weight"  # "rope" in the name is enough for timm's filter to drop it
    state[f"visual.{rope}"] = torch.zeros(3)
    converted(state, "eva02_tiny_patch14_224")
    state[f"visual.{rope}"] = torch.ones(3)
    with pytest.raises(TeacherError, match=f"holds 1 tensors that the model has no place for .*{rope}"):
        converted(state, "eva02_tiny_patch14_224")


def clip(dim: int, patch: int, grid: int, depth: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of OpenAI's vision tower."""
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (dim,), "positional_embedding": (grid**2 + 1, dim), "proj": (dim, 512),
        "conv1.weight": (dim, 3, patch, patch), "ln_pre.weight": (dim,), "ln_pre.bias": (dim,),
        "ln_post.weight": (dim,), "ln_post.bias": (dim,),
    }  # fmt: skip
    for block in range(depth):
        b = f"transformer.resblocks.{block}"
        shapes |= {f"{b}.ln_{n}.{part}": (dim,) for n in (1, 2) for part in ("weight", "bias")}
        shapes |= {f"{b}.attn.in_proj_weight": (3 * dim, dim), f"{b}.attn.in_proj_bias": (3 * dim,)}
        shapes |= {f"{b}.attn.out_proj.weight": (dim, dim), f"{b}.attn.out_proj.bias": (dim,)}
        shapes |= {f"{b}.mlp.c_fc.weight": (4 * dim, dim), f"{b}.mlp.c_fc.bias": (4 * dim,)}
        shapes |= {f"{b}.mlp.c_proj.weight": (dim, 4 * dim), f"{b}.mlp.c_proj.bias": (dim,)}
    return shapes


def test_openais_own_head_is_dropped_after_timm_made_it() -> None:
    name = "vit_base_patch16_clip_quickgelu_224.openai"
    state = meta({f"visual.{key}": shape for key, shape in clip(768, 16, 14, 12).items()})
    state |= meta({"logit_scale": (), "transformer.resblocks.0.ln_1.weight": (512,)})
    assert fits(converted(state, name).state, name)


def test_perception_encoders_own_head_is_dropped() -> None:
    name = "vit_pe_core_tiny_patch16_384"
    state = empty(name).state_dict()
    names = {
        "patch_embed.proj": "conv1", "pos_embed": "positional_embedding", "norm_pre": "ln_pre",
        "attn.qkv.": "attn.in_proj_",
        "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "cls_token": "class_embedding",
        "attn_pool.latent": "attn_pool.probe", "attn_pool.norm": "attn_pool.layernorm",
        "attn_pool.proj": "attn_pool.attn.out_proj",
    }  # fmt: skip
    theirs = State()
    for key, value in state.items():
        new = key
        for ours, original in names.items():
            new = new.replace(ours, original)
        if key.startswith("blocks."):
            new = new.replace("blocks.", "transformer.resblocks.").replace("norm1", "ln_1").replace("norm2", "ln_2")
        elif key.startswith("norm."):
            new = new.replace("norm.", "ln_post.")
        if not key.startswith(("attn_pool.q.", "attn_pool.kv.")):
            theirs[new] = value[0] if key == "pos_embed" else value[0, 0] if key == "cls_token" else value
    for part in ("weight", "bias"):
        joined = [state[f"attn_pool.{n}.{part}"] for n in ("q", "kv")]
        theirs[f"attn_pool.attn.in_proj_{part}"] = torch.cat(joined)
    dim = state["cls_token"].shape[-1]
    theirs["proj"] = torch.empty(dim, 512, device="meta")
    assert fits(converted(theirs, name).state, name)


def test_eva02_clips_own_head_is_dropped() -> None:
    name = "eva02_base_patch16_clip_224.merged2b"
    state = empty(name).state_dict() | meta({"head.weight": (512, 768), "head.bias": (512,)})
    state = {f"visual.{key}": value for key, value in state.items()} | meta({"text.positional_embedding": (77, 512)})
    assert fits(converted(state, name).state, name)


def test_nvidias_radio_says_which_file_to_take() -> None:
    state = meta({"radio_model.model.patch_generator.embedder.weight": (768, 768)})
    with pytest.raises(TeacherError, match=r"take model\.safetensors of timm/"):
        converted(state, "vit_base_patch16_radio_v3")


def test_the_digest_is_of_the_weights_before_any_resampling(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And a cache of before, which knows the resampled tensors' digest, is recognised."""
    model = timm.create_model("test_vit", num_classes=0)
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    native = build_teacher("timm:test_vit", weights=tmp_path / "own.safetensors")
    small = build_teacher("timm:test_vit", weights=tmp_path / "own.safetensors", image_size=32)
    assert native.weights_sha256 == small.weights_sha256
    assert native.weights_sha256 == state_digest({f"model.{k}": v for k, v in model.state_dict().items()})
    before = state_digest(small.backbone.state_dict())
    assert before != small.weights_sha256
    assert not small.recognises("0" * 64)
    assert not native.recognises(before)
    assert small.recognises(before)
    assert small.identity()["weights_sha256"] == before

    state = timm.create_model("test_vit", num_classes=0, img_size=64).state_dict()
    save_file(state, tmp_path / "other.safetensors")
    other = build_teacher("timm:test_vit", weights=tmp_path / "other.safetensors")
    assert other.weights_sha256 == state_digest({f"model.{key}": value for key, value in state.items()})
    assert "were resampled" in caplog.text
