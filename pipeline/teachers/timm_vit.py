"""ViTs of timm as teachers: DINO v1 to v3, SigLIP, supervised ones; with class and register tokens, any patch size."""

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import timm
import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models import beit
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock
from torch import Tensor, nn

from pipeline.errors import TeacherError, suggest
from pipeline.teachers.attention import class_row, pooling_row
from pipeline.teachers.conversion import to_timm
from pipeline.teachers.teacher import Trace, vit_macs
from pipeline.teachers.weights import fetching, load_strictly, read_weights

NEEDED = ("blocks", "norm", "patch_embed", "num_prefix_tokens", "embed_dim", "forward_intermediates", "set_input_size")


class TimmBackbone(nn.Module):
    """A timm ViT whose blocks all work on one grid of patch tokens.

    Args:
        model: the network; its position embeddings are resampled here if `image_size` differs from its own.
        name: for messages.
        image_size: pixels a side; None for the model's own.
        mean, std: of its training pixels.
        projection: a head that maps single normed tokens, if there is one.

    Raises:
        TeacherError: no plain ViT, or a size that its patches don't divide.
    """

    libraries: Mapping[str, str] = MappingProxyType({"timm": version("timm")})

    def __init__(
        self,
        model: Any,
        name: str,
        image_size: int | None,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        projection: nn.Module | None = None,
        projected_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.projection = projection
        self.mean, self.std = mean, std
        _check_plain(model, name)
        self.image_size = fit_size(name, image_size, _native_size(model), model.patch_embed.patch_size)
        before = model.state_dict()
        model.set_input_size((self.image_size, self.image_size))
        self.native: Mapping[str, Tensor] = {
            f"model.{key}": before[key]
            for key, value in model.state_dict().items()
            if key in before and value.data_ptr() != before[key].data_ptr()
        }
        self.grid: tuple[int, int] = tuple(model.patch_embed.grid_size)
        self.dim: int = model.embed_dim
        self.projected_dim = projected_dim
        self.depth = len(model.blocks)
        self.num_prefix: int = model.num_prefix_tokens
        self.row = _choose_row(model)
        self.has_attention = self.row is not None
        self.has_summary = getattr(model, "cls_token", None) is not None
        attn = getattr(model.blocks[-1], "attn", None)  # parallel blocks have several, or none apart
        self.num_heads: int = getattr(attn, "num_heads", 0)

    def trace(self, x: Tensor, layers: int) -> Trace:
        """See `Backbone.trace`. One block more than asked is kept: the last block's input, for the attention row."""
        keep = min(layers + 1, self.depth)
        outputs = self.model.forward_intermediates(
            x, keep, return_prefix_tokens=self.num_prefix > 0, output_fmt="NLC", intermediates_only=True
        )
        blocks = tuple(_join(output) for output in outputs)
        rows = self.row(self.model, blocks) if self.row is not None else None
        return Trace(blocks[-layers:], rows)

    def macs(self) -> int:
        """See `Backbone.macs`."""
        return vit_macs(self.model.patch_embed, self.model.blocks, self.grid, self.num_prefix, self.dim)

    def norm(self, tokens: Tensor) -> Tensor:
        """See `Backbone.norm`."""
        return final_norm(self.model)(tokens)  # type: ignore[no-any-return]

    def project(self, tokens: Tensor) -> Tensor:
        """See `Backbone.project`."""
        assert self.projection is not None
        return self.projection(tokens)  # type: ignore[no-any-return]


def build_timm(name: str, weights: str | None, image_size: int | None) -> tuple[TimmBackbone, str]:
    """Build `timm:<name>`; also return the name of its weights.

    Args:
        name: a timm model, with the tag of its weights after a dot.
        weights: None for timm's hub, "random", or a local file in timm's or the model's original naming.
        image_size: pixels a side, None for the model's own.

    Raises:
        TeacherError: unknown name, no plain ViT, weights that can't be had or don't fit.
    """
    config = known_config(name)
    native: dict[str, Tensor] = {}
    if weights is None:
        hub = config.hf_hub_id or config.url
        if not hub:
            raise TeacherError(f"teacher 'timm:{name}' has no public weights: give teacher.weights=FILE")
        file = "model.safetensors" if config.hf_hub_id else "the file"
        with fetching(f"timm:{name}", f"{file} of {hub}"):
            model = timm.create_model(name, pretrained=True, num_classes=0)
        label = str(hub)
    elif weights == "random":
        model, label = random_model(lambda: timm.create_model(name, num_classes=0)), "random"
    else:
        model, native = _load_local(name, Path(weights))
        label = Path(weights).name
    backbone = TimmBackbone(model, f"timm:{name}", image_size, tuple(config.mean), tuple(config.std))
    backbone.native = {**backbone.native, **{f"model.{key}": value for key, value in native.items()}}
    return backbone, label


def random_model(build: Callable[[], Any]) -> Any:
    """Build with the library's own initialisation from a fixed seed; the caller's random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def fit_size(name: str, asked: int | None, native: tuple[int, int], patch: tuple[int, int]) -> int:
    """The input size in pixels: `asked`, or the model's own if that is square; patches must divide it."""
    if asked is None and native[0] != native[1]:
        raise TeacherError(f"teacher '{name}' sees {native[0]}x{native[1]} and views are square: give image_size")
    size = native[0] if asked is None else asked
    if size < 1 or size % patch[0] or size % patch[1]:
        raise TeacherError(f"teacher '{name}': image_size={size} is no multiple of its {patch[0]}-pixel patch")
    return size


def final_norm(model: Any) -> nn.Module:
    """The norm after the last block; in mean-pooled models it is the one after the pooling."""
    norm: nn.Module = model.norm
    return model.fc_norm if isinstance(norm, nn.Identity) and hasattr(model, "fc_norm") else norm


# QuickGELU by open_clip's record of the same weights; timm has no network with it for them
WITHOUT_TWIN = {"vit_base_patch16_clip_224.dfn2b": "open_clip:ViT-B-16-quickgelu:dfn2b"}


def known_config(name: str) -> Any:
    """timm's entry for `name`: the address of its weights and the normalisation of its pixels."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture) or (tag and name not in timm.list_pretrained(f"{architecture}.*")):
        hint = suggest(name, timm.list_models(pretrained=True), "timm.list_models('*vit*') lists what there is")
        raise TeacherError(f"timm has no model '{name}': {hint}")
    config: Any = timm.get_pretrained_cfg(name)
    quick = f"{architecture.replace('_clip_', '_clip_quickgelu_')}.{config.tag}"
    right = WITHOUT_TWIN.get(f"{architecture}.{config.tag}")
    if "quickgelu" not in name and quick in timm.list_pretrained("*_clip_quickgelu_*"):
        right = f"timm:{quick}"
    if right:
        raise TeacherError(
            f"teacher 'timm:{name}' has GELU and its weights were trained with QuickGELU, so that its tokens would be "
            f"wrong: choose {right}"
        )
    return config


def _load_local(name: str, file: Path) -> tuple[Any, dict[str, Tensor]]:
    """The model without its classifier, from a file; and the tensors that were resampled, as the file has them."""
    state = read_weights(file)
    model = timm.create_model(name, num_classes=0)
    converted = to_timm(state, model, name, str(file))
    load_strictly(model, converted.state, str(file))
    return model, converted.native


def _native_size(model: Any) -> tuple[int, int]:
    height, width = model.patch_embed.img_size
    return height, width


def _check_plain(model: Any, name: str) -> None:
    """A plain ViT keeps one grid and one width through all blocks; other models have no token for each patch."""
    lacking = [attribute for attribute in NEEDED if not hasattr(model, attribute)]
    grids = {(info["num_chs"], info["reduction"]) for info in getattr(model, "feature_info", ())}
    if lacking or len(grids) != 1 or not hasattr(model.patch_embed, "grid_size"):
        raise TeacherError(f"teacher '{name}' is no plain ViT with patch tokens: choose a vit_*, deit_*, eva_* model")


def _join(output: Any) -> Tensor:
    """Prefix and patches as the block had them, for the attention row; timm returns them apart."""
    if isinstance(output, Tensor):
        return output
    patches, prefix = output
    return torch.cat([prefix, patches], dim=1)


Row = Callable[[Any, tuple[Tensor, ...]], Tensor]


def _choose_row(model: Any) -> Row | None:
    """The query of the focus row: the class token, or that of the pooling head, or none."""
    block = model.blocks[-1]
    if getattr(model, "cls_token", None) is not None and len(model.blocks) > 1:
        return KNOWN_ROWS.get((type(block), type(getattr(block, "attn", None))))
    return _pooling_row if isinstance(getattr(model, "attn_pool", None), AttentionPoolLatent) else None


def _class_row(model: Any, blocks: tuple[Tensor, ...]) -> Tensor:
    last = model.blocks[-1]
    return class_row(last.attn, last.norm1(blocks[-2]))


def _rotary_row(model: Any, blocks: tuple[Tensor, ...]) -> Tensor:
    last, tokens = model.blocks[-1], blocks[-2]
    attended = tokens if isinstance(last, EvaBlockPostNorm) else last.norm1(tokens)
    return class_row(last.attn, attended, rope=_last_rope(model))


def _beit_row(model: Any, blocks: tuple[Tensor, ...]) -> Tensor:
    """Biases by relative position are the block's, or shared by all blocks, or both, or there are none."""
    last = model.blocks[-1]
    tables = [module for module in (last.attn, model.rel_pos_bias) if module is not None]
    biases = [
        module.relative_position_bias_table[module.relative_position_index[0]].T.unsqueeze(1)  # [H,1,N]
        for module in tables
        if module.relative_position_bias_table is not None
    ]
    return class_row(last.attn, last.norm1(blocks[-2]), bias=sum(biases) if biases else None)


def _relative_row(model: Any, blocks: tuple[Tensor, ...]) -> Tensor:
    last = model.blocks[-1]
    positions = last.attn.rel_pos or model.shared_rel_pos
    return class_row(last.attn, last.norm1(blocks[-2]), bias=positions.get_bias()[0, :, :1])


def _pooling_row(model: Any, blocks: tuple[Tensor, ...]) -> Tensor:
    """The row over all tokens; a prefix that isn't pooled gets zero columns. timm's Eva always pools it."""
    prefix = model.num_prefix_tokens
    if getattr(model, "pool_include_prefix", True):
        return pooling_row(model.attn_pool, model.norm(blocks[-1]))
    rows = pooling_row(model.attn_pool, model.norm(blocks[-1][:, prefix:]))
    return nn.functional.pad(rows, (prefix, 0))


def _last_rope(model: Any) -> Tensor | None:
    """Rotary angles of the last block; `rope_mixed` models have a set of their own for each block."""
    if model.rope is None:
        return None
    cached = not model.dynamic_img_size and hasattr(model.rope, "feat_shape")
    rope: Tensor = model.rope.get_embed() if cached else model.rope.get_embed(shape=model.patch_embed.grid_size)
    return rope[-1] if getattr(model, "rope_mixed", False) else rope


# Exact types: a subclass may compute its attention differently.
KNOWN_ROWS: dict[tuple[type, type], Row] = {
    (Block, Attention): _class_row,
    (EvaBlock, EvaAttention): _rotary_row,  # EVA-02, DINOv3
    (EvaBlock, AttentionRope): _rotary_row,  # PE, Naver's rotary ViTs, Sapiens2
    (EvaBlockPostNorm, EvaAttention): _rotary_row,  # EVA02-E
    (EvaBlockPostNorm, AttentionRope): _rotary_row,
    (beit.Block, beit.Attention): _beit_row,
    (RelPosBlock, RelPosAttention): _relative_row,
}
