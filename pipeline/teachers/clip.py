"""CLIP's vision towers from open_clip as teachers. Towers that open_clip takes from timm become a `TimmBackbone`."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import open_clip
import torch
from open_clip.pretrained import download_pretrained
from open_clip.timm_model import TimmModel
from open_clip.transformer import (
    Attention,
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    VisionTransformer,
)
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from pipeline.errors import TeacherError, suggest
from pipeline.teachers.attention import clip_class_row
from pipeline.teachers.teacher import Trace, vit_macs
from pipeline.teachers.timm_vit import TimmBackbone, fit_size, random_model
from pipeline.teachers.weights import fetching, load_strictly, read_weights

# open_clip builds both towers together. This is the smallest text tower that it makes; it is discarded.
TINY_TEXT = {"context_length": 8, "vocab_size": 8, "width": 64, "heads": 1, "layers": 1}
# open_clip's normalisation of an architecture without any tag.
_DEFAULTS = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}


class ClipBackbone(nn.Module):
    """open_clip's own `VisionTransformer`: one class token, no registers.

    Args:
        visual: the vision tower; its position embeddings are resampled here if `image_size` differs from its own.
        name: for messages.
        image_size: pixels a side; None for the tower's own.
        mean, std: of its training pixels.
    """

    libraries: Mapping[str, str] = MappingProxyType({"open_clip": version("open_clip_torch")})
    num_prefix = 1

    def __init__(
        self, visual: Any, name: str, image_size: int | None, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.model = visual
        self.mean, self.std = mean, std
        self.image_size = fit_size(name, image_size, tuple(visual.image_size), tuple(visual.patch_size))
        positions = visual.positional_embedding
        self.grid = _resample_positions(visual, self.image_size)
        resampled = visual.positional_embedding is not positions
        self.native: Mapping[str, Tensor] = {"model.positional_embedding": positions.detach()} if resampled else {}
        blocks = visual.transformer.resblocks
        self.dim: int = visual.transformer.width
        self.depth = len(blocks)
        self.num_heads: int = blocks[-1].attn.num_heads
        # With an attention pool the norm and the projection come after the pooling and fit no single token.
        pooled = visual.attn_pool is not None
        self.final_norm: nn.Module = visual.attn_pool.ln_k if pooled else visual.ln_post
        self.projected_dim: int | None = None if pooled or visual.proj is None else visual.proj.shape[1]
        self.has_attention = self.depth > 1 and _can_focus(visual)
        self.has_summary = _pools_by_class_token(visual)

    def trace(self, x: Tensor, layers: int) -> Trace:
        """See `Backbone.trace`. One block more than asked is kept: the last block's input, for the attention row."""
        output = self.model.forward_intermediates(
            x,
            min(layers + 1, self.depth),
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        pairs = zip(output["image_intermediates_prefix"], output["image_intermediates"], strict=True)
        blocks = tuple(torch.cat(pair, dim=1) for pair in pairs)
        return Trace(blocks[-layers:], self._row(blocks[-2]) if self.has_attention else None)

    def macs(self) -> int:
        """See `Backbone.macs`."""
        return vit_macs(self.model.conv1, self.model.transformer.resblocks, self.grid, self.num_prefix, self.dim)

    def norm(self, tokens: Tensor) -> Tensor:
        """See `Backbone.norm`."""
        normed: Tensor = self.final_norm(tokens)
        return normed

    def project(self, tokens: Tensor) -> Tensor:
        """See `Backbone.project`."""
        projected: Tensor = tokens @ self.model.proj
        return projected

    def _row(self, last_input: Tensor) -> Tensor:
        block = self.model.transformer.resblocks[-1]
        return clip_class_row(block.attn, block.ln_1(last_input))


def build_open_clip(name: str, weights: str | None, image_size: int | None) -> tuple[ClipBackbone | TimmBackbone, str]:
    """Build `open_clip:<arch>:<tag>`; also return the name of its weights.

    Args:
        name: architecture and tag. The tag also decides the activation and the normalisation of pixels, so local and
            random weights need it too, unless all tags of the architecture agree or it has none.
        weights: None for the tag's download, "random", or a local file with `visual.*` tensors, or the tower's alone.
        image_size: pixels a side, None for the architecture's own.

    Raises:
        TeacherError: unknown architecture or tag, a tower that is no ViT, weights that can't be had or don't fit.
    """
    architecture, _, tag = name.partition(":")
    config = _known_config(architecture, tag, local=weights is not None)
    spec = f"open_clip:{name}"
    visual = random_model(lambda: _build_visual(architecture, bool(config.get("quick_gelu"))))
    label = "random"
    if weights is None:
        label = str(config.get("hf_hub") or config.get("url")).rstrip("/")
        with fetching(spec, f"open_clip_model.safetensors of {label}"):
            file = download_pretrained(config)
        _load_visual(visual, Path(file), label)
    elif weights != "random":
        label = Path(weights).name
        _load_visual(visual, Path(weights), weights)
    return _wrap(visual, spec, image_size, tuple(config["mean"]), tuple(config["std"])), label


def _wrap(
    visual: Any, spec: str, image_size: int | None, mean: tuple[float, ...], std: tuple[float, ...]
) -> ClipBackbone | TimmBackbone:
    if isinstance(visual, VisionTransformer):
        return ClipBackbone(visual, spec, image_size, mean, std)
    if isinstance(visual, TimmModel):
        # open_clip either adds a linear head of its own or lets the trunk's classifier be the projection.
        for linear in (getattr(visual.head, "proj", None), visual.trunk.head):
            if isinstance(linear, nn.Linear):
                return TimmBackbone(visual.trunk, spec, image_size, mean, std, linear, linear.out_features)
        return TimmBackbone(visual.trunk, spec, image_size, mean, std)
    raise TeacherError(f"teacher '{spec}' has no ViT as its vision tower: choose a ViT-* architecture")


def _known_config(architecture: str, tag: str, local: bool) -> dict[str, Any]:
    """open_clip's entry for the tag's weights: their address, mean and std, QuickGELU or not.

    `local` weights need no tag if all tags of the architecture agree, or if it has none.
    """
    if architecture not in open_clip.list_models():
        hint = suggest(architecture, open_clip.list_models(), "open_clip.list_models() lists what there is")
        raise TeacherError(f"open_clip has no architecture '{architecture}': {hint}")
    config: dict[str, Any] = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    if not config:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        if not tag and local:
            configs = [open_clip.get_pretrained_cfg(architecture, other) for other in tags] or [_DEFAULTS]
            if len({(tuple(c["mean"]), tuple(c["std"]), bool(c.get("quick_gelu"))) for c in configs}) == 1:
                return dict(configs[0])
        if not tags:
            raise TeacherError(
                f"open_clip has no weights of {architecture}: give open_clip:{architecture} and teacher.weights=FILE"
            )
        names = ", ".join(f"{architecture}:{other}" for other in tags)
        raise TeacherError(f"open_clip has no weights '{tag}' of {architecture}: choose open_clip:<one of {names}>")
    return config


def _build_visual(architecture: str, quick_gelu: bool) -> Any:
    """The vision tower with fresh weights. OpenAI's weights need QuickGELU, which their tag tells."""
    config = open_clip.get_model_config(architecture)
    quick_gelu = quick_gelu or config.get("quick_gelu", False)
    return open_clip.CLIP(config["embed_dim"], config["vision_cfg"], TINY_TEXT, quick_gelu=quick_gelu).visual


def _load_visual(visual: nn.Module, file: Path, source: str) -> None:
    """Load the tower from a checkpoint of both towers, or of the vision tower alone; with or without its projection."""
    state = read_weights(file)
    tower = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")} or state
    if isinstance(visual, TimmModel) and not any(key.startswith(("trunk.", "head.")) for key in tower):
        tower = {f"trunk.{key}": value for key, value in tower.items()}
    if isinstance(visual, VisionTransformer) and "proj" not in tower:
        visual.proj = None  # teacher.tokens=projected is refused then
    load_strictly(visual, tower, source)


def _resample_positions(visual: Any, size: int) -> tuple[int, int]:
    """Bicubic, antialiased resampling of the position embeddings [1+L,D] to another input size, in place."""
    grid = (size // visual.patch_size[0], size // visual.patch_size[1])
    if grid != tuple(visual.grid_size):
        positions = resample_abs_pos_embed(visual.positional_embedding[None], list(grid), list(visual.grid_size))
        visual.positional_embedding = nn.Parameter(positions[0].detach())
    visual.grid_size, visual.image_size = grid, (size, size)
    return grid


def _can_focus(visual: Any) -> bool:
    """Whether the class token's row can be used: the model pools by it, and its attention is one computed here."""
    if visual.attn_pool is None and not _pools_by_class_token(visual):
        return False
    block = visual.transformer.resblocks[-1]
    if type(block) is ResidualAttentionBlock:
        return True
    custom = type(block) is CustomResidualAttentionBlock and type(block.attn) is Attention
    return custom and block.attn.logit_scale is None


def _pools_by_class_token(visual: Any) -> bool:
    return visual.attn_pool is None and visual.pool_type == "tok"
