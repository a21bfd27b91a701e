"""Layouts of Hugging Face's transformers → those of the models' own releases, which timm and open_clip read.

    state = from_transformers(state, "model.safetensors")  # unchanged if it has no such layout

Five families: CLIP (`CLIPVisionModel`, `CLIPModel`), SigLIP and SigLIP 2 (`SiglipVisionModel`, `SiglipModel`), DINOv2
(`Dinov2Model`, with registers too) and DINOv3 (`DINOv3ViTModel`). Tensors are renamed, and queries, keys and values
joined; no value is changed. Shapes: D channels, L patches, p pixels a patch.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pipeline.errors import TeacherError

State = dict[str, Tensor]
Renames = tuple[tuple[str, str], ...]

_CLIP: Renames = (
    (r"embeddings\.class_embedding", "class_embedding"),
    (r"embeddings\.patch_embedding\.", "conv1."),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"pre_layrnorm\.", "ln_pre."),  # so written in transformers
    (r"post_layernorm\.", "ln_post."),
    (r"encoder\.layers\.(\d+)\.layer_norm", r"transformer.resblocks.\1.ln_"),
    (r"encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"transformer.resblocks.\1.attn.in_proj_"),
    (r"encoder\.layers\.(\d+)\.self_attn\.", r"transformer.resblocks.\1.attn."),
    (r"encoder\.layers\.(\d+)\.mlp\.fc1\.", r"transformer.resblocks.\1.mlp.c_fc."),
    (r"encoder\.layers\.(\d+)\.mlp\.fc2\.", r"transformer.resblocks.\1.mlp.c_proj."),
)
_SIGLIP: Renames = (
    (r"embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"embeddings\.position_embedding\.weight", "pos_embed"),
    (r"post_layernorm\.", "norm."),
    (r"encoder\.layers\.(\d+)\.layer_norm", r"blocks.\1.norm"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layers\.(\d+)\.self_attn\.", r"blocks.\1.attn."),
    (r"encoder\.layers\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
    (r"head\.probe", "attn_pool.latent"),
    (r"head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"head\.layernorm\.", "attn_pool.norm."),
    (r"head\.mlp\.", "attn_pool.mlp."),
)
_DINOV2: Renames = (
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"embeddings\.(\w+_tokens?)", r"\1"),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.", r"blocks.\1.attn."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.mlp\.weights_in\.", r"blocks.\1.mlp.w12."),
    (r"encoder\.layer\.(\d+)\.mlp\.weights_out\.", r"blocks.\1.mlp.w3."),
    (r"encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"layernorm\.", "norm."),
)
_DINOV3: Renames = (
    (r"embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"embeddings\.register_tokens", "storage_tokens"),
    (r"embeddings\.(\w+_token)", r"\1"),
    (r"layer\.(\d+)\.attention\.o_proj\.", r"blocks.\1.attn.proj."),
    (r"layer\.(\d+)\.attention\.", r"blocks.\1.attn."),
    (r"layer\.(\d+)\.layer_scale(\d)\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"layer\.(\d+)\.mlp\.gate_proj\.", r"blocks.\1.mlp.w1."),
    (r"layer\.(\d+)\.", r"blocks.\1."),
)
# Tensors of the text tower and of the contrastive loss.
_BESIDE = ("text_model.", "text_projection.", "logit_scale", "logit_bias")
_TOP = re.compile(r"^(vision_model|dinov2(_with_registers)?|dinov3_vit|model)\.")
_BUFFERS = ("position_ids", "inv_freq")
_OTHERS = re.compile(r"(^|\.)(embeddings\.patch_embeddings?\.|encoder\.layers?\.\d+\.|attention\.attention\.query\.)")


def from_transformers(state: Mapping[str, Tensor], source: str) -> State:
    """A state dict in the layout of the model's own release; one that is in none of transformers' is unchanged.

    Raises:
        TeacherError: a layout of transformers without a conversion here.
    """
    beside = {key: value for key, value in state.items() if not key.startswith(_BESIDE)}
    tower = {_TOP.sub("", key): value for key, value in beside.items() if not key.endswith(_BUFFERS)}
    for mark, convert in _FAMILIES.items():
        if mark in tower:
            return convert(tower)
    if any(_OTHERS.search(key) for key in state):
        raise TeacherError(
            f"teacher.weights={source} is in a layout of Hugging Face's transformers that isn't converted here: take "
            "the file of the model's own release, or model.safetensors of its repository under timm/"
        )
    return dict(state)


def _clip(state: State) -> State:
    """→ OpenAI's names, with the projection if the file has one: [projected, D] there, [D, projected] here."""
    projection = state.pop("visual_projection.weight", None)
    tower = _rename(_join(state, "q_proj", "k_proj", "v_proj"), _CLIP)
    tower |= {} if projection is None else {"proj": projection.T.contiguous()}
    return {f"visual.{key}": value for key, value in tower.items()}


def _siglip(state: State) -> State:
    """→ timm's names. The pooling head's joined query, key and value are split into the query and the other two."""
    tower = _rename(_join(state, "q_proj", "k_proj", "v_proj"), _SIGLIP)
    tower["pos_embed"] = tower["pos_embed"][None]  # [L,D] → [1,L,D]
    for part in ("weight", "bias"):
        joined = tower.pop(f"head.attention.in_proj_{part}", None)
        if joined is not None:
            tower[f"attn_pool.q.{part}"], tower[f"attn_pool.kv.{part}"] = joined.tensor_split([len(joined) // 3])
    return tower


def _dinov2(state: State) -> State:
    """→ Meta's names. timm knows the layout by its mask token, so there is always one."""
    tower = _rename(_join(_without_heads(state), "query", "key", "value"), _DINOV2)
    tower.setdefault("mask_token", torch.zeros_like(tower["cls_token"][0]))
    return tower


def _dinov3(state: State) -> State:
    """→ Meta's names. Keys have no bias in transformers; in Meta's file a mask makes theirs zero."""
    tower = _rename(_join(_without_heads(state), "q_proj", "k_proj", "v_proj"), _DINOV3)
    gated = any(".mlp.w1." in key for key in tower)
    up, down = ("w2", "w3") if gated else ("fc1", "fc2")
    names = {"up_proj": up, "down_proj": down}
    return {re.sub(r"(?<=\.mlp\.)\w+_proj", lambda match: names[match[0]], key): tower[key] for key in tower}


# Each family by a tensor that only it has.
_FAMILIES: dict[str, Callable[[State], State]] = {
    "embeddings.class_embedding": _clip,
    "embeddings.patch_embedding.weight": _siglip,
    "encoder.layer.0.layer_scale1.lambda1": _dinov2,
    "layer.0.layer_scale1.lambda1": _dinov3,
}


def _without_heads(state: State) -> State:
    return {key: value for key, value in state.items() if not key.startswith("classifier.")}


def _join(state: State, q: str, k: str, v: str) -> State:
    """`X.q.weight`, `X.k.weight` and `X.v.weight` → `X.qkv.weight`, biases alike; an absent key bias is zeros."""
    joined = {key: value for key, value in state.items() if not re.search(rf"\.({q}|{k}|{v})\.(weight|bias)$", key)}
    for key, query in state.items():
        stem, dot, part = key.rpartition(f".{q}.")
        if dot:
            value = state[f"{stem}.{v}.{part}"]
            keys = state.get(f"{stem}.{k}.{part}", torch.zeros_like(query))
            joined[f"{stem}.qkv.{part}"] = torch.cat([query, keys, value])
    return joined


def _rename(state: State, renames: Renames) -> State:
    """Replace the beginning of each name by the first pattern that matches it."""

    def new(key: str) -> str:
        for pattern, replacement in renames:
            renamed, count = re.subn(f"^{pattern}", replacement, key)
            if count:
                return renamed
        return key

    return {new(key): value for key, value in state.items()}
