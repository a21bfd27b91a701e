"""A file in a model's original naming → timm's, by timm's own filters but more strictly.

timm resamples patch kernels and positions without a word, and drops tensors that have no place. Here another patch size
is refused, and so is a file that would lose a non-zero tensor. Resampled positions are logged.
"""

import importlib
import inspect
import logging
import re
from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any, NamedTuple

import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from pipeline.errors import TeacherError

log = logging.getLogger(__name__)

State = dict[str, Tensor]
Filter = Callable[[State], State]

_KERNELS = re.compile(r"(^|\.)(patch_embed\.proj|patch_embed\.projection|conv1|patchifier\.proj)\.weight$")
_TOWERS = ("visual.", "vision_encoder.", "beit3.")
# May be dropped: heads, parts for pre-training alone, other towers' branches, and tables that the model computes.
_BESIDE = re.compile(
    r"(^|[._])(head|head_dist|lm_head|mask_token|decoder\w*|projectors|local_cls_norm|pre_logits|text_embed|B"
    r"|bias_mask|rope\w*|periods|relative_position_index)([._]|$)"
)


class Converted(NamedTuple):
    """A state that fits the model, and the tensors that were resampled for it, as the file has them."""

    state: State
    native: State


def to_timm(state: Mapping[str, Tensor], model: Any, name: str, source: str) -> Converted:
    """Convert a state dict of timm's naming, or of a release that timm knows, for a model without classifier.

    Args:
        state: as the file has it.
        model: the timm model that it is for; not changed.
        name: the model's name in timm.
        source: the file, for messages.

    Raises:
        TeacherError: another patch size, tensors that would be lost, a layout that timm would convert by resampling.
    """
    if any(key.startswith("radio_model.") for key in state):
        raise TeacherError(
            f"teacher.weights={source} is NVIDIA's own file of RADIO, whose positions timm resamples in a way of its "
            f"own: take model.safetensors of timm/{name}"
        )
    _check_patch(state, model, name, source)
    state = _settle_biases(state, model, name, source)
    convert = _filter_of(name)
    _check_losses(state, convert, source)
    converted = convert(dict(state))
    expected = model.state_dict()
    heads = _heads(name)
    converted = {
        key: value
        for key, value in converted.items()
        if key in expected or not (key.partition(".")[0] in heads or key.startswith("decoder"))
    }
    return _fit_positions(converted, state, model, source)


def _filter_of(name: str) -> Filter:
    """timm's filter for this model. It is given a stand-in without positions, so that it doesn't resample them."""
    with torch.device("meta"):
        stand_in: Any = timm.create_model(name, num_classes=0)
    stand_in.pos_embed = None
    function = getattr(importlib.import_module(type(stand_in).__module__), "checkpoint_filter_fn", None)
    if function is None:
        return lambda state: state
    options = {"adapt_layer_scale": True} & inspect.signature(function).parameters.keys()
    return lambda state: function(state, stand_in, **dict.fromkeys(options, True))


def _heads(name: str) -> set[str]:
    """First parts of the names of heads that only classify or project."""
    config: Any = timm.get_pretrained_cfg(name)
    classifier = config.classifier or ()
    return {"head", "head_dist", "mask_token", *((classifier,) if isinstance(classifier, str) else classifier)}


def _check_patch(state: Mapping[str, Tensor], model: Any, name: str, source: str) -> None:
    kernel = getattr(getattr(model.patch_embed, "proj", None), "weight", None)
    if kernel is None or kernel.ndim != 4 or kernel.shape[1] != 3:
        return  # a convolutional stem: its shapes are compared when it is loaded
    for key, value in state.items():
        if _KERNELS.search(key) and value.ndim in (2, 4) and value[0].numel() != kernel[0].numel():
            side = isqrt(value[0].numel() // 3)
            raise TeacherError(
                f"teacher.weights={source} has {side}-pixel patches ({key}) where timm:{name} has {kernel.shape[-1]}: "
                "choose the teacher that the file is of"
            )


def _settle_biases(state: Mapping[str, Tensor], model: Any, name: str, source: str) -> State:
    """DINOv3's biases of queries, keys and values, in the form that timm has a place for.

    Meta's file keeps a mask beside each, which is zero for the keys. timm has one model without any biases and one
    (`_qkvb`) with those of queries and values.
    """
    settled = dict(state)
    keys = [key for key in state if key.endswith("attn.qkv.bias")] if "storage_tokens" in state else []
    has_place = any(key.endswith("attn.q_bias") for key in model.state_dict())
    for key in keys:
        mask = state.get(f"{key}_mask")
        bias = state[key] if mask is None or not mask.isfinite().all() else state[key] * mask
        query, keys_bias, value = bias.chunk(3)
        if keys_bias.any():
            raise TeacherError(
                f"teacher.weights={source} has biases of keys ({key}) that timm's DINOv3 has no place for: take "
                f"model.safetensors of timm/{name}"
            )
        settled[key] = bias
        if not has_place:
            if query.any() or value.any():
                raise TeacherError(
                    f"teacher.weights={source} has biases of queries and values ({key}) that timm:{name} would leave "
                    f"away: choose timm:{name.replace('_dinov3', '_dinov3_qkvb')}"
                )
            del settled[key]
    return settled


def _check_losses(state: State, convert: Filter, source: str) -> None:
    """Refuse a conversion that drops a non-zero tensor of the network that is asked for."""
    used = _used(state, convert)
    tower = next((prefix for prefix in _TOWERS if used and all(key.startswith(prefix) for key in used)), "")
    lost = [
        key
        for key in sorted(state.keys() - used)
        if key.startswith(tower) and not _BESIDE.search(key) and state[key].any()
    ]
    if lost:
        raise TeacherError(
            f"teacher.weights={source} holds {len(lost)} tensors that the model has no place for "
            f"({', '.join(lost[:3])}): choose the teacher that the file is of"
        )


def _used(state: State, convert: Filter) -> set[str]:
    """Names of the tensors that reach the converted state; autograd on the meta device tells, at no cost."""
    leaves = {
        key: torch.empty(value.shape, device="meta", requires_grad=True)
        for key, value in state.items()
        if value.numel()
    }
    reached = [value.sum() for value in convert(dict(leaves)).values() if value.requires_grad]
    if not reached:
        return set()
    grads = torch.autograd.grad(torch.stack(reached).sum(), list(leaves.values()), allow_unused=True)
    return {key for key, grad in zip(leaves, grads, strict=True) if grad is not None}


def _fit_positions(converted: State, state: State, model: Any, source: str) -> Converted:
    """Resample positions of another square grid to the model's, as timm does (bicubic, antialiased), and log it."""
    native = {key: state[key] for key in converted if key in state and state[key].shape != converted[key].shape}
    expected, positions = getattr(model, "pos_embed", None), converted.get("pos_embed")
    if expected is not None and positions is not None and positions.shape != expected.shape:
        prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
        side = isqrt(max(0, positions.shape[1] - prefix)) if positions.ndim == 3 else 0
        if side and side * side == positions.shape[1] - prefix and positions.shape[2] == expected.shape[2]:
            native["pos_embed"] = positions
            grid = list(model.patch_embed.grid_size)
            resampled = resample_abs_pos_embed(positions, grid, [side, side], prefix)
            converted = {**converted, "pos_embed": resampled}
            log.warning(
                "teacher.weights=%s: positions of a %dx%d grid were resampled to the model's %dx%d: it is of another "
                "input size",
                *(source, side, side, *grid),
            )
    if native.keys() - {"pos_embed"}:
        log.warning("teacher.weights=%s: tables of relative positions were resampled to the model's grid", source)
    return Converted(converted, native)
