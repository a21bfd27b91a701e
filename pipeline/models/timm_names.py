"""Students of timm by name, `timm:NAME`: what timm says of a model before it is built, and its pixels."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import timm
from timm.layers.patch_embed import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pipeline.errors import ConfigError, suggest
from pipeline.meta import meta_device
from pipeline.pixels import IMAGENET_MEAN, IMAGENET_STD, to_other_pixels

PREFIX = "timm:"


@dataclass(frozen=True)
class TimmModel:
    """A model of timm.

    Attributes:
        name: without the prefix, with the tag of its weights if one was given.
        kind: the name of its class.
        maskable: whether its patches can be encoded apart from each other: a plain ViT.
        dim: channels of its tokens, or of its last map.
        depth, num_heads: of a plain ViT's transformer; 1 of other models.
        patch_size: pixels a side that one token, or one cell of the last map, stands for.
        mean, std: of its pixels in 0..1.
    """

    name: str
    kind: str
    maskable: bool
    dim: int
    depth: int
    num_heads: int
    patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class OwnPixels(nn.Module):
    """From images as all students take them, [B, 3, H, W], to those by whose mean and deviation a model was trained."""

    scale: Tensor
    shift: Tensor

    def __init__(self, named: TimmModel) -> None:
        super().__init__()
        scale, shift = to_other_pixels(named.mean, named.std)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.is_needed = (named.mean, named.std) != (IMAGENET_MEAN, IMAGENET_STD)

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale + self.shift if self.is_needed else images


def is_timm(name: str) -> bool:
    """Whether a student's name is one of timm's."""
    return name.startswith(PREFIX)


def is_maskable(student: str) -> bool:
    """Whether the student of this name can be trained under a mask.

    Raises:
        ConfigError: as `timm_model`.
    """
    return not is_timm(student) or timm_model(student).maskable


@cache
def timm_model(student: str) -> TimmModel:
    """What `timm:NAME` is.

    Raises:
        ConfigError: timm has no such model, or it gives no feature maps.
    """
    name = student.removeprefix(PREFIX)
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture) or (tag and name not in timm.list_pretrained(f"{architecture}.*")):
        hint = suggest(name, timm.list_models(pretrained=True), "timm.list_models() lists what there is")
        raise ConfigError(f"student.name={student}: timm has no model '{name}': {hint}")
    with meta_device():
        model: Any = timm.create_model(name, num_classes=0)
    config: Any = timm.get_pretrained_cfg(name)
    pixels = (tuple(config.mean), tuple(config.std)) if config else (IMAGENET_MEAN, IMAGENET_STD)
    kind = type(model).__name__
    if is_plain(model):
        block: Any = model.blocks[0]
        return TimmModel(
            name, kind, True, model.embed_dim, len(model.blocks), block.attn.num_heads, model.patch_embed.patch_size[0],
            *pixels,
        )  # fmt: skip
    if not hasattr(model, "forward_intermediates") or not getattr(model, "feature_info", None):
        raise ConfigError(f"student.name={student} ({kind}) gives no feature maps: choose another model of timm")
    last = dict(model.feature_info[-1])
    return TimmModel(name, kind, False, last["num_chs"], 1, 1, last["reduction"], *pixels)


def is_plain(model: Any) -> bool:
    """Whether a model of timm is a plain ViT: linear square patches, and nothing but attention mixes tokens.

    Exact types: a subclass may compute its tokens differently.
    """
    embed = getattr(model, "patch_embed", None)
    return (
        type(model) in (VisionTransformer, Eva)
        and type(embed) is PatchEmbed
        and isinstance(embed.proj, nn.Conv2d)
        and embed.proj.kernel_size == embed.proj.stride
        and embed.patch_size[0] == embed.patch_size[1]
        and hasattr(model.blocks[0], "attn")
    )
