"""A student or classifier of this project as the next one's teacher: `mrmae:<checkpoint>`.

The stage that builds the teacher loads the checkpoint and hands the module over, so this wing imports no other.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import TeacherError
from pipeline.teachers.attention import class_row, mean_row
from pipeline.teachers.teacher import Trace

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class PatchEncoder(Protocol):
    """What a module must offer to be a teacher; the project's encoders do."""

    blocks: Sequence[nn.Module]  # transformer blocks over the patch tokens; the last one's `.attn` is timm's Attention
    num_prefix_tokens: int
    # Whose attention is the focus: the class token's, the mean over the patches', or nobody's.
    attention_query: Literal["cls", "mean", "none"]
    grid: tuple[int, int]
    dim: int
    image_size: int | tuple[int, int]  # pixels; views are square

    def forward_tokens(self, images: Tensor) -> Tensor:
        """ImageNet-normalised [B,3,S,S] → patch tokens [B,L,D] after the final norm, prefix dropped."""
        ...


class MrmaeBackbone(nn.Module):
    """Listens at the blocks of a `PatchEncoder` while it runs once.

    Args:
        module: a `PatchEncoder` that is an `nn.Module`.
        name: for messages.
        image_size: None or the module's own; its positions are fixed.
    """

    library = "mrmae"
    projected_dim: int | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    native: Mapping[str, Tensor] = MappingProxyType({})

    def __init__(self, module: Any, name: str, image_size: int | None) -> None:
        super().__init__()
        self.model = module
        self.image_size = _side(module.image_size, name)
        if image_size not in (None, self.image_size):
            raise TeacherError(f"teacher '{name}' was built for image_size={self.image_size}, not {image_size}")
        self.grid: tuple[int, int] = tuple(module.grid)
        self.dim: int = module.dim
        self.depth = len(module.blocks)
        self.num_prefix: int = module.num_prefix_tokens
        attn = getattr(module.blocks[-1], "attn", None)
        self.has_attention = module.attention_query != "none" and isinstance(attn, Attention)
        self.num_heads: int = getattr(attn, "num_heads", 0)

    def trace(self, x: Tensor, layers: int) -> Trace:
        """See `Backbone.trace`."""
        with _listen(self.model.blocks[-layers:], self.model.blocks[-1]) as heard:
            final = self.model.forward_tokens(x)
        blocks = tuple(heard.outputs)
        rows = self._row(heard.attention_input) if self.has_attention else None
        return Trace(blocks, rows, final)

    def macs(self) -> int:
        """See `Backbone.macs`. Counted on one black image, since the stages before the blocks may be anything."""
        pixels = torch.zeros(1, 3, self.image_size, self.image_size, device=next(self.model.parameters()).device)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.model.forward_tokens(pixels)
        return int(counter.get_total_flops()) // 2

    def norm(self, tokens: Tensor) -> Tensor:
        """Only asked for means over several blocks, which these encoders norm nowhere."""
        raise TeacherError("a mrmae: teacher norms its last block alone: set teacher.layers=1, or teacher.tokens=block")

    def project(self, tokens: Tensor) -> Tensor:
        """Never asked for: `projected_dim` is None."""
        return tokens

    def _row(self, attention_input: Tensor) -> Tensor:
        attn = self.model.blocks[-1].attn
        if self.model.attention_query == "cls":
            return class_row(attn, attention_input)
        return mean_row(attn, attention_input, self.num_prefix)


def _side(image_size: int | Sequence[int], name: str) -> int:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height != width:
        raise TeacherError(f"teacher '{name}' sees {height}x{width} and views are square: choose one with square input")
    return height


class _Heard:
    """What hooks caught during one forward."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.attention_input = torch.empty(0)

    def keep_output(self, _module: nn.Module, _args: object, output: Tensor) -> None:
        self.outputs.append(output)

    def keep_input(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.attention_input = args[0]


@contextmanager
def _listen(blocks: Sequence[nn.Module], last: Any) -> Iterator[_Heard]:
    """Catch the outputs of `blocks`, in order, and what enters the last block's attention."""
    heard = _Heard()
    handles = [block.register_forward_hook(heard.keep_output) for block in blocks]
    if hasattr(last, "attn"):
        handles.append(last.attn.register_forward_pre_hook(heard.keep_input))
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def build_mrmae(checkpoint: str, module: nn.Module | None, image_size: int | None) -> tuple[MrmaeBackbone, str]:
    """Wrap a module that a stage built from `checkpoint`, and say what its weights are called: the file's name.

    Raises:
        TeacherError: no module was handed over, or it lacks what a `PatchEncoder` has.
    """
    name = f"mrmae:{checkpoint}"
    if module is None:
        raise TeacherError(f"teacher '{name}' needs its module: build_teacher(..., module=the loaded encoder)")
    lacking = [member for member in (*PatchEncoder.__annotations__, "forward_tokens") if not hasattr(module, member)]
    if lacking:
        raise TeacherError(f"teacher '{name}': {type(module).__name__} lacks {', '.join(lacking)}, see PatchEncoder")
    return MrmaeBackbone(module, name, image_size), Path(checkpoint).name
