"""A student or classifier of this project as the next one's teacher: `mrmae:<checkpoint>`.

The caller loads the checkpoint and passes the module, so this wing imports no other.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from pipeline.errors import TeacherError
from pipeline.pixels import IMAGENET_MEAN, IMAGENET_STD
from pipeline.teachers.attention import class_row, mean_row
from pipeline.teachers.teacher import Trace, counted_macs


class PatchEncoder(Protocol):
    """What a module must offer to be a teacher; the project's encoders do."""

    # Transformer blocks over the patch tokens; the last one's `.attn` is timm's, with a class token also a rotary one.
    blocks: Sequence[nn.Module]
    num_prefix_tokens: int
    # The query whose attention row is the focus: the class token, the mean over the patches, or none.
    attention_query: Literal["cls", "mean", "none"]
    grid: tuple[int, int]
    dim: int
    image_size: int | tuple[int, int]  # pixels; views are square

    def forward_tokens(self, images: Tensor) -> Tensor:
        """ImageNet-normalised [B,3,S,S] → patch tokens [B,L,D] after the final norm, prefix dropped."""
        ...


class MrmaeBackbone(nn.Module):
    """A `PatchEncoder` behind the `Backbone` protocol; hooks collect what its blocks compute.

    Args:
        module: a `PatchEncoder` that is an `nn.Module`.
        name: for messages.
        image_size: None or the module's own; its positions are fixed.
    """

    libraries: Mapping[str, str] = MappingProxyType({})  # its checkpoint says what it is
    projected_dim: int | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    native: Mapping[str, Tensor] = MappingProxyType({})

    def __init__(self, module: Any, name: str, image_size: int | None) -> None:
        super().__init__()
        if not module.blocks:
            raise TeacherError(f"teacher '{name}' is no transformer, and gives no tokens to mimic: choose a ViT")
        self.model = module
        self.image_size = _side(module.image_size, name)
        if image_size not in (None, self.image_size):
            raise TeacherError(f"teacher '{name}' was built for image_size={self.image_size}, not {image_size}")
        self.grid: tuple[int, int] = tuple(module.grid)
        self.dim: int = module.dim
        self.depth = len(module.blocks)
        self.num_prefix: int = module.num_prefix_tokens
        attn = getattr(module.blocks[-1], "attn", None)
        readable: tuple[type, ...] = (Attention,)
        if module.attention_query == "cls":
            readable = (Attention, EvaAttention, AttentionRope)
        self.has_attention = module.attention_query != "none" and isinstance(attn, readable)
        self.num_heads: int = getattr(attn, "num_heads", 0)
        self.has_summary = module.attention_query == "cls"
        # Under a classifier lies an encoder, whose norm its class token passes.
        self.class_norm: nn.Module | None = getattr(module, "encoder", module).norm if self.has_summary else None

    def trace(self, x: Tensor, layers: int) -> Trace:
        """See `Backbone.trace`."""
        last = self.model.blocks[-1]
        with _capture(self.model.blocks[-layers:], last) as (outputs, attention_inputs):
            final = self.model.forward_tokens(x)
        rows = None
        final_class = None if self.class_norm is None else self.class_norm(outputs[-1][:, :1])
        if self.has_attention and self.model.attention_query == "cls":
            rows = class_row(last.attn, *attention_inputs[0])
        elif self.has_attention:
            rows = mean_row(last.attn, attention_inputs[0][0], self.num_prefix)
        return Trace(tuple(outputs), rows, final, final_class)

    def macs(self) -> int:
        """See `Backbone.macs`. Counted on one black image, since what comes before the blocks may be anything."""
        pixels = torch.zeros(1, 3, self.image_size, self.image_size, device=next(self.model.parameters()).device)
        return counted_macs(self.model.forward_tokens, pixels)

    def norm(self, tokens: Tensor) -> Tensor:
        """Only needed for means over several blocks, and these encoders have no norm for each block."""
        raise TeacherError("a mrmae: teacher norms its last block alone: set teacher.layers=1, or teacher.tokens=block")

    def project(self, tokens: Tensor) -> Tensor:
        """Never called: `projected_dim` is None."""
        return tokens


def _side(image_size: int | Sequence[int], name: str) -> int:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height != width:
        raise TeacherError(f"teacher '{name}' sees {height}x{width} and views are square: choose one with square input")
    return height


@contextmanager
def _capture(
    blocks: Sequence[nn.Module], last: Any
) -> Iterator[tuple[list[Tensor], list[tuple[Tensor, Tensor | None]]]]:
    """Collect the outputs of `blocks`, in order, and what enters the last block's attention: tokens, rotary angles."""
    outputs: list[Tensor] = []
    inputs: list[tuple[Tensor, Tensor | None]] = []

    def enter(_module: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        inputs.append((args[0], options.get("rope")))

    handles = [block.register_forward_hook(lambda _module, _args, output: outputs.append(output)) for block in blocks]
    if hasattr(last, "attn"):
        handles.append(last.attn.register_forward_pre_hook(enter, with_kwargs=True))
    try:
        yield outputs, inputs
    finally:
        for handle in handles:
            handle.remove()


def build_mrmae(checkpoint: str, module: nn.Module | None, image_size: int | None) -> tuple[MrmaeBackbone, str]:
    """Wrap a module that the caller loaded from `checkpoint`; also return the name of its weights, the file's.

    Raises:
        TeacherError: no module was given, or it lacks what a `PatchEncoder` has.
    """
    name = f"mrmae:{checkpoint}"
    if module is None:
        raise TeacherError(f"teacher '{name}' needs its module: build_teacher(..., module=the loaded encoder)")
    lacking = [member for member in (*PatchEncoder.__annotations__, "forward_tokens") if not hasattr(module, member)]
    if lacking:
        raise TeacherError(f"teacher '{name}': {type(module).__name__} lacks {', '.join(lacking)}, see PatchEncoder")
    return MrmaeBackbone(module, name, image_size), Path(checkpoint).name
