"""One row of an attention map: softmax(q·kᵀ/√d) for the class query alone (Vaswani et al., arXiv 1706.03762, eq. 1).

Focus needs one query's row, so the full [heads, N, N] map of a batch is never computed. Queries and keys are projected
as the block does it, in the block's own precision. Logits and softmax are always fp32, under autocast too.

Shapes: B images, H heads, d channels a head, N = P + L tokens (P prefix: class and registers, L patches), Q queries.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor, nn

# Patch queries handled at once by `mean_row`: bounds its memory at B × H × 32 × N floats.
QUERY_CHUNK = 32


def class_row(attn: Any, x: Tensor, rope: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Row of the class token in an attention of timm: ViT, EVA, DINOv3, PE, BEiT.

    Args:
        attn: module with a joined `qkv`, or with `q_proj` and `k_proj`; with `num_heads` and `scale`.
        x: [B,N,D], the attention's own input, so after the block's first norm if that comes first.
        rope: rotary angles (arXiv 2104.09864). They turn the patches' keys. Prefix tokens, the class query among them,
            stay as they are.
        bias: [H,1,N], of the class query; it is added to the logits (arXiv 2106.08254).

    Returns:
        [B,H,N] fp32, every head's row sums to 1.
    """
    query, key = _project_timm(attn, x[:, :1], x)
    if rope is not None:
        prefix, patches = key.tensor_split([attn.num_prefix_tokens], dim=2)
        key = torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=attn.rotate_half).type_as(prefix)], dim=2)
    if key.shape[1] < query.shape[1]:  # several query heads share a key head (arXiv 2305.13245)
        key = key.repeat_interleave(attn.num_kv_groups, dim=1)
    return _softmax_rows(query, key, attn.scale, bias)[:, :, 0]


def mean_row(attn: Any, x: Tensor, num_prefix: int) -> Tensor:
    """Mean over the patch queries' rows in a timm `Attention`: the attention that a patch receives, [B,H,N] fp32.

    For students without a class token. Computed a few queries at a time; the map itself is never held.
    """
    query, key = _project_timm(attn, x[:, num_prefix:], x)
    chunks = torch.split(query, QUERY_CHUNK, dim=2)
    total = sum((_softmax_rows(chunk, key, attn.scale).sum(dim=2) for chunk in chunks), start=key.new_zeros(()).float())
    mean: Tensor = total / query.shape[2]
    return mean


def clip_class_row(attn: Any, x: Tensor) -> Tensor:
    """Row of the first token in a CLIP tower's attention, [B,H,N] fp32.

    Args:
        attn: torch's `MultiheadAttention`, as in OpenAI's CLIP, or open_clip's `Attention`, which also norms q and k.
        x: [B,N,D], as in `class_row`.
    """
    query, key = _project(x[:, :1], x, attn.in_proj_weight, attn.in_proj_bias, attn.num_heads)
    if isinstance(attn, nn.MultiheadAttention):
        return _softmax_rows(query, key, attn.head_dim**-0.5)[:, :, 0]
    return _softmax_rows(attn.ln_q(query), attn.ln_k(key), attn.scale)[:, :, 0]


def pooling_row(pool: Any, tokens: Tensor) -> Tensor:
    """Row of the learnt query in timm's `AttentionPoolLatent` (SigLIP's head, arXiv 2303.15343), [B,H,N] fp32.

    Args:
        pool: the pooling module.
        tokens: [B,N,D], what the model pools: its tokens after the final norm.
    """
    if pool.pos_embed is not None:
        tokens = tokens + pool.pos_embed.to(tokens.dtype)
    weight_k, _ = pool.kv.weight.chunk(2)
    bias_k = None if pool.kv.bias is None else pool.kv.bias.chunk(2)[0]
    latent = pool.latent.expand(tokens.shape[0], -1, -1)
    query = pool.q_norm(_split_heads(pool.q(latent), pool.num_heads))
    key = pool.k_norm(_split_heads(F.linear(tokens, weight_k, bias_k), pool.num_heads))
    return _softmax_rows(query, key, pool.scale).mean(dim=2)


def patches_only(rows: Tensor, num_prefix: int) -> Tensor:
    """Drop the prefix columns, average the heads and scale each image's row to sum 1: [B,H,N] → [B,L]."""
    mean = rows[:, :, num_prefix:].mean(dim=1)
    return mean / mean.sum(dim=-1, keepdim=True)


def _project_timm(attn: Any, queries: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Normed queries [B,H,Q,d] of tokens [B,Q,D] and keys [B,H or fewer,N,d] of all tokens, as timm's attentions do."""
    if attn.qkv is None:
        key_heads = attn.num_heads // getattr(attn, "num_kv_groups", 1)
        query = _split_heads(attn.q_proj(queries), attn.num_heads)
        key = _split_heads(attn.k_proj(x), key_heads)
    elif getattr(attn, "q_bias", None) is not None:  # EVA and BEiT: keys have no bias
        weight_q, weight_k, _ = attn.qkv.weight.chunk(3)
        query = _split_heads(F.linear(queries, weight_q, attn.q_bias), attn.num_heads)
        key = _split_heads(F.linear(x, weight_k), attn.num_heads)
    else:
        query, key = _project(queries, x, attn.qkv.weight, attn.qkv.bias, attn.num_heads)
    if hasattr(attn, "q_norm"):  # BEiT has none
        return attn.q_norm(query), attn.k_norm(key)
    return query, key


def _project(queries: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, num_heads: int) -> tuple[Tensor, Tensor]:
    """Query tokens [B,Q,D] and all keys [B,N,D] through a joined qkv layer: [B,H,Q,d] and [B,H,N,d]."""
    weight_q, weight_k, _ = weight.chunk(3)
    bias_q, bias_k, _ = (None,) * 3 if bias is None else bias.chunk(3)
    query = _split_heads(F.linear(queries, weight_q, bias_q), num_heads)
    return query, _split_heads(F.linear(x, weight_k, bias_k), num_heads)


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B,N,H·d] → [B,H,N,d]."""
    return x.reshape(*x.shape[:2], num_heads, -1).transpose(1, 2)


def _softmax_rows(query: Tensor, key: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """[B,H,Q,d], [B,H,N,d], bias [H,Q,N] → [B,H,Q,N] fp32; bf16, as autocast would have it, is too coarse."""
    # The meta device, on which a network is traced before its weights are fetched, knows no autocast.
    with nullcontext() if query.is_meta else torch.autocast(query.device.type, enabled=False):
        logits = query.float() * scale @ key.float().transpose(-2, -1)
        return (logits if bias is None else logits + bias.float()).softmax(dim=-1)
