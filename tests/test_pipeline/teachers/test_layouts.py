"""Layouts of transformers: names written here from its modeling files, values from the libraries' own models."""

import re
from typing import Any

import pytest
import torch
from open_clip.transformer import VisionTransformer as ClipTower
from timm.models.eva import Eva, checkpoint_filter_fn
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pipeline.errors import TeacherError
from pipeline.teachers.layouts import from_transformers

TINY: dict[str, Any] = {
    "img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 0
}  # fmt: skip
State = dict[str, Tensor]


def drawn(model: torch.nn.Module) -> State:
    """Every tensor other than it was, so that none can be taken for another."""
    generator = torch.Generator().manual_seed(3)
    return {key: torch.randn(value.shape, generator=generator) for key, value in model.state_dict().items()}


def renamed(state: State, pairs: list[tuple[str, str]]) -> State:
    def new(key: str) -> str:
        for old, name in pairs:
            key = re.sub(old, name, key)
        return key

    return {new(key): value for key, value in state.items()}


def split(state: State, joined: str, names: tuple[str, str, str]) -> State:
    """`blocks.0.attn.qkv.weight` → one tensor each for query, key and value."""
    out = State()
    for key, value in state.items():
        if joined in key:
            out |= {key.replace(joined, name): part for name, part in zip(names, value.chunk(3), strict=True)}
        else:
            out[key] = value
    return out


def same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("whole", [True, False], ids=["CLIPModel", "CLIPVisionModel"])
def test_clip(whole: bool) -> None:
    state = drawn(ClipTower(16, 8, 12, 2, 2, 4.0, output_dim=6))
    projection = state.pop("proj")
    expected = {f"visual.{key}": value for key, value in state.items()}
    theirs = {key.replace("in_proj_", "in_proj."): value for key, value in state.items()}
    theirs = split(theirs, "attn.in_proj.", ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."))
    theirs = renamed(
        theirs,
        [
            ("^class_embedding", "embeddings.class_embedding"),
            ("^conv1", "embeddings.patch_embedding"),
            ("^positional_embedding", "embeddings.position_embedding.weight"),
            ("^ln_pre", "pre_layrnorm"),
            ("^ln_post", "post_layernorm"),
            (r"^transformer\.resblocks", "encoder.layers"),
            (r"\.attn\.", ".self_attn."),
            (r"\.ln_", ".layer_norm"),
            ("c_fc", "fc1"),
            ("c_proj", "fc2"),
        ],
    )
    theirs = {f"vision_model.{key}": value for key, value in theirs.items()}
    theirs["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    if whole:
        theirs |= {"visual_projection.weight": projection.T, "logit_scale": torch.ones(())}
        theirs |= {"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(3, 3)}
        expected["visual.proj"] = projection
    same(from_transformers(theirs, "f"), expected)


def test_siglip() -> None:
    state = drawn(VisionTransformer(**TINY, class_token=False, global_pool="map"))
    pooling = {
        part: torch.cat([state.pop(f"attn_pool.{n}.{part}") for n in ("q", "kv")]) for part in ("weight", "bias")
    }
    theirs = split(state, "attn.qkv.", ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."))
    theirs = renamed(
        theirs,
        [
            (r"^patch_embed\.proj", "embeddings.patch_embedding"),
            ("^pos_embed", "embeddings.position_embedding.weight"),
            (r"^norm\.", "post_layernorm."),
            (r"^attn_pool\.latent", "head.probe"),
            (r"^attn_pool\.proj", "head.attention.out_proj"),
            (r"^attn_pool\.norm", "head.layernorm"),
            (r"^attn_pool", "head"),
            (r"^blocks\.(\d)\.attn\.proj", r"encoder.layers.\1.self_attn.out_proj"),
            (r"^blocks\.(\d)\.norm", r"encoder.layers.\1.layer_norm"),
            (r"^blocks", "encoder.layers"),
        ],
    )
    theirs["embeddings.position_embedding.weight"] = theirs["embeddings.position_embedding.weight"][0]
    theirs |= {f"head.attention.in_proj_{part}": value for part, value in pooling.items()}
    expected = drawn(VisionTransformer(**TINY, class_token=False, global_pool="map"))
    same(from_transformers({f"vision_model.{key}": value for key, value in theirs.items()}, "f"), expected)


@pytest.mark.parametrize("prefix", ["", "dinov2."])
def test_dinov2(prefix: str) -> None:
    state = drawn(VisionTransformer(**TINY, init_values=0.1))
    names = [f"attention.attention.{part}." for part in ("query", "key", "value")]
    theirs = renamed(
        split(state, "attn.qkv.", (names[0], names[1], names[2])),
        [
            ("^cls_token", "embeddings.cls_token"),
            ("^pos_embed", "embeddings.position_embeddings"),
            (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
            (r"attn\.proj", "attention.output.dense"),
            (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"),
            (r"^norm\.", "layernorm."),
            ("^blocks", "encoder.layer"),
        ],
    )
    mask = torch.ones(1, 12)
    theirs["embeddings.mask_token"] = mask
    found = from_transformers({f"{prefix}{key}": value for key, value in theirs.items()}, "f")
    same(found, {**state, "mask_token": mask})


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3(gated: bool) -> None:
    rotary: dict[str, Any] = {"use_rot_pos_emb": True, "use_abs_pos_emb": False, "rope_type": "dinov3"}
    gate: dict[str, Any] = {"swiglu_mlp": True, "swiglu_align_to": 8} if gated else {}
    model = Eva(**{**TINY, "embed_dim": 16}, **rotary, **gate, num_reg_tokens=2, init_values=0.1, qkv_bias=True)
    state = drawn(model)
    theirs = split(state, "attn.qkv.", ("attention.q_proj.", "attention.k_proj.", "attention.v_proj."))
    theirs = renamed(
        theirs,
        [
            ("^(cls_token)", r"embeddings.\1"),
            ("^reg_token", "embeddings.register_tokens"),
            (r"^patch_embed\.proj", "embeddings.patch_embeddings"),
            (r"attn\.proj", "attention.o_proj"),
            (r"attn\.([qv])_bias", r"attention.\1_proj.bias"),
            (r"gamma_(\d)", r"layer_scale\1.lambda1"),
            ("fc1_g", "gate_proj"),
            ("fc1_x|fc1", "up_proj"),
            ("fc2", "down_proj"),
            ("^blocks", "layer"),
        ],
    )
    theirs["embeddings.mask_token"] = torch.ones(1, 1, 16)
    same(checkpoint_filter_fn(from_transformers(theirs, "f"), model), state)


def test_other_layouts_say_which_file_to_take() -> None:
    vit = {"vit.encoder.layer.0.attention.attention.query.weight": torch.ones(2, 2)}
    with pytest.raises(TeacherError, match="transformers that isn't converted here: take the file of"):
        from_transformers(vit, "model.safetensors")


def test_what_is_of_no_such_layout_stays_as_it_is() -> None:
    state = drawn(VisionTransformer(**TINY))
    same(from_transformers(state, "f"), state)
