"""A teacher: uint8 views in, patch tokens and the attention row that focus samples by out.

    teacher = build_teacher("dino_vitb16")
    out = teacher(views)  # uint8 [B,3,S,S] -> fp32 tokens [B,L,D], attention [B,L], summary [B,1,D]

The steps are `prepare` (pixels, resized and normalised for this network), `trace` (the forward) and `read` (the tokens
and the row that were asked for). What differs between libraries is a `Backbone`, each in a file of its own.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.configs.teachers import TokenChoice
from pipeline.errors import TeacherError
from pipeline.flop_counting import flop_counter
from pipeline.teachers.attention import patches_only
from pipeline.weights import state_digest

RESIZE_FILTER = "bicubic, antialiased, clamped to 0..255, not rounded"


class TeacherOutput(NamedTuple):
    """A teacher's output for a batch. The L patches are in row-major order of the grid."""

    tokens: Tensor  # [B,L,D] fp32
    attention: Tensor | None  # [B,L] fp32, rows sum to 1; None if the model has no row to focus by
    attention_heads: Tensor | None = None  # [B,H,L] fp32, the row of each head, not renormalised; only on request
    summary: Tensor | None = None  # [B,1,D] fp32, the class token, read where the tokens are; None if there is none


class Trace(NamedTuple):
    """What one forward computed, prefix tokens included."""

    blocks: tuple[Tensor, ...]  # outputs of the last k blocks, oldest first, each [B,P+L,D]
    rows: Tensor | None  # [B,H,P+L] fp32, the attention row of every head
    final: Tensor | None = None  # [B,L,D], the last block normed, if the network computes that itself
    final_class: Tensor | None = None  # [B,1,D], the class token beside `final`


class Backbone(Protocol):
    """What a teacher needs of a ViT, in any library. All backbones are `nn.Module`s."""

    model: nn.Module
    libraries: Mapping[str, str]  # the package or code that it comes from → version, for the fingerprint
    image_size: int  # pixels a side
    grid: tuple[int, int]  # patches, rows × columns
    dim: int  # channels of a block's output
    projected_dim: int | None  # channels after the model's projection, None when it has none
    depth: int
    num_heads: int
    num_prefix: int  # class and register tokens before the patches
    has_attention: bool
    has_summary: bool  # whether the first prefix token is a class token
    mean: tuple[float, ...]  # of the pixels in 0..1, a channel
    std: tuple[float, ...]
    native: Mapping[str, Tensor]  # by names of `state_dict`, as the file has them: tensors resampled to `image_size`

    def trace(self, x: Tensor, layers: int) -> Trace:
        """Run normalised pixels [B,3,S,S] once and keep the last `layers` blocks and the attention rows."""
        ...

    def macs(self) -> int:
        """Multiply-accumulates of one view's forward."""
        ...

    def norm(self, tokens: Tensor) -> Tensor:
        """The model's final norm on block outputs [B,L,D]."""
        ...

    def project(self, tokens: Tensor) -> Tensor:
        """The model's projection on normed tokens: [B,L,D] → [B,L,projected_dim]."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """Every weight that a token may depend on, by name: `model` and a projection beside it."""
        ...


class Teacher(nn.Module):
    """A frozen ViT on uint8 views; always in eval mode, never with gradients.

    Args:
        backbone: the network.
        spec: the name that the user gave; `name` is its short form for tables and file names.
        weights: the name of the weights: a file's name, a hub id or "random".
        tokens: "norm" is the last block after the final norm, "block" the raw block, "projected" the projection.
        layer: the block that is read, counted from 1; None for the last one. The attention stays the last block's.
        layers: read the mean of this many blocks, `layer` and those before it, each normed (and projected) by itself.
        dtype: autocast precision of the forward; the weights, the attention row and the outputs stay fp32.
        compile: let torch.compile take the forward.

    Attributes:
        grid: patches, rows × columns; L is their product.
        dim: D, channels of a token as it is read.
        depth: how many of the last blocks must be kept to read its tokens.
        image_size: pixels a side of the network's input; views of another size are resized to it.
        has_attention: whether there is a row to focus by. Without one, pre-train with `focus: random`.
        has_summary: whether there is a class token, which stands for the whole view.

    Raises:
        TeacherError: `tokens`, `layer` or `layers` ask for what this model doesn't have.
    """

    backbone: Backbone
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        spec: str,
        name: str,
        weights: str,
        tokens: TokenChoice = "norm",
        layer: int | None = None,
        layers: int = 1,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
    ) -> None:
        super().__init__()
        layer = backbone.depth if layer is None else layer
        _check_choice(backbone, name, tokens, layer, layers)
        self.backbone = backbone
        self.grid, self.image_size = backbone.grid, backbone.image_size
        self.has_attention, self.has_summary = backbone.has_attention, backbone.has_summary
        self.dim = (backbone.projected_dim if tokens == "projected" else None) or backbone.dim
        self.spec, self.name, self.weights = spec, name, weights
        self.tokens, self.layer, self.layers, self.dtype = tokens, layer, layers, dtype
        self.depth = backbone.depth - layer + layers
        self.register_buffer("pixel_mean", torch.tensor(backbone.mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("pixel_std", torch.tensor(backbone.std).view(1, 3, 1, 1) * 255, persistent=False)
        self.compiled = compile
        self._trace = torch.compile(backbone.trace) if compile else backbone.trace
        self._digest: str | None = None
        self.train(False).requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The wrapped network, as its library made it."""
        return self.backbone.model

    @property
    def device(self) -> torch.device:
        """The device of its weights, on which it takes its views."""
        return self.pixel_mean.device

    @property
    def gmacs(self) -> float:
        """Billions of multiply-accumulates of one view's forward."""
        return self.backbone.macs() / 1e9

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode, also when a model that holds this teacher is set to train."""
        super().train(False)
        return self

    def prepare(self, views: Tensor) -> Tensor:
        """uint8 [B,3,S,S] RGB → fp32 [B,3,image_size,image_size], normalised with this teacher's mean and std."""
        if views.dtype != torch.uint8 or views.ndim != 4 or views.shape[1] != 3:
            raise TeacherError(
                f"teacher '{self.name}' takes uint8 RGB views [B,3,S,S], not {views.dtype} {list(views.shape)}"
            )
        return (resize_views(views, self.image_size) - self.pixel_mean) / self.pixel_std

    def trace(self, views: Tensor, depth: int | None = None) -> Trace:
        """Run the forward, for `read`. Keeps the last `depth` blocks; by default as many as this teacher reads."""
        reduced = self.dtype != torch.float32
        autocast = torch.autocast(views.device.type, self.dtype) if reduced else nullcontext()
        with torch.no_grad():
            pixels = self.prepare(views)
            with autocast:
                return self._trace(pixels, depth or self.depth)

    def read(self, trace: Trace, heads: bool = False) -> TeacherOutput:
        """Tokens, attention and summary from a forward of the same weights. No gradients."""
        prefix = self.backbone.num_prefix
        with torch.no_grad():
            if trace.final is not None and self.tokens == "norm" and self.depth == 1:
                tokens = trace.final.float()
                summary = None if trace.final_class is None else trace.final_class.float()
            else:
                tokens = self._read_blocks(trace, slice(prefix, None))
                summary = self._read_blocks(trace, slice(1)) if self.has_summary else None
            if trace.rows is None:
                return TeacherOutput(tokens, None, None, summary)
            rows = trace.rows[:, :, prefix:] if heads else None
            return TeacherOutput(tokens, patches_only(trace.rows, prefix), rows, summary)

    def forward(self, views: Tensor, heads: bool = False) -> TeacherOutput:
        """`TeacherOutput` of uint8 RGB views [B,3,S,S] on this teacher's device.

        Args:
            views: any S; resized by `resize_views` when it isn't `image_size`.
            heads: also return every head's row, prefix columns dropped, not renormalised.

        Raises:
            TeacherError: views of another type or shape.
        """
        return self.read(self.trace(views), heads)

    def identity(self) -> dict[str, Any]:
        """All that decides this teacher's outputs, JSON-able, for a cache's fingerprint."""
        backbone = self.backbone
        return {
            "name": self.name,
            "spec": self.spec,
            "weights": self.weights,
            "weights_sha256": self.weights_sha256,
            "tokens": self.tokens,
            "layers": self.layers,
            "image_size": self.image_size,
            "grid": list(self.grid),
            "dim": self.dim,
            "num_heads": backbone.num_heads,
            "dtype": str(self.dtype).removeprefix("torch."),
            "resize": RESIZE_FILTER,
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "libraries": {"torch": str(torch.__version__), **backbone.libraries},
            **({"layer": self.layer} if self.layer < backbone.depth else {}),
            **({"compile": True} if self.compiled else {}),
        }

    @property
    def weights_sha256(self) -> str:
        """Digest of the weights, the same for every file format; computed once (about 1 s a GB).

        Tensors that were resampled to `image_size` count as the file has them: a resampling's last bits depend on the
        CPU.
        """
        if self._digest is None:
            self._digest = state_digest({**self.backbone.state_dict(), **self.backbone.native})
        return self._digest

    def recognises(self, digest: str) -> bool:
        """Whether a recorded digest is of these weights. If it is, this teacher's identity has it from then on.

        Older caches hold the digest of the resampled tensors; they stay valid.
        """
        if self.backbone.native and digest == state_digest(self.backbone.state_dict()):
            self._digest = digest
        return digest == self.weights_sha256

    def _read_blocks(self, trace: Trace, where: slice) -> Tensor:
        """Some tokens of the blocks, as asked for, fp32: the mean over several blocks."""
        blocks = trace.blocks[-self.depth :][: self.layers]
        chosen = [self._choose(block[:, where].float()) for block in blocks]
        return chosen[0] if len(chosen) == 1 else torch.stack(chosen).mean(dim=0)

    def _choose(self, block: Tensor) -> Tensor:
        """Block output [B,L,D] → the tokens asked for, fp32."""
        if self.tokens == "block":
            return block
        normed = self.backbone.norm(block)
        return normed if self.tokens == "norm" else self.backbone.project(normed)


def resize_views(views: Tensor, size: int) -> Tensor:
    """uint8 [B,3,S,S] → fp32 [B,3,size,size] in 0..255; exact if S is `size`.

    Otherwise antialiased bicubic, clamped because bicubic overshoots. `RESIZE_FILTER` names it in the fingerprint.
    """
    pixels = views.float()
    if views.shape[-2:] == (size, size):
        return pixels
    return F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)


def vit_macs(
    embedding: nn.Module, blocks: Iterable[nn.Module], grid: tuple[int, int], num_prefix: int, dim: int
) -> int:
    """Multiply-accumulates of one view in a plain ViT: the patch embedding's weights once a patch, the blocks' matrices
    once a token, and the two attention products, 2·N²·D a block. Norms, activations and heads are left out."""
    patches = grid[0] * grid[1]
    tokens = patches + num_prefix
    total = patches * sum(weight.numel() for weight in embedding.parameters() if weight.ndim == 4)
    for block in blocks:
        matrices = sum(weight.numel() for weight in block.parameters() if weight.ndim == 2)
        total += tokens * matrices + 2 * tokens * tokens * dim
    return total


def counted_macs(forward: Callable[[Tensor], Any], pixels: Tensor) -> int:
    """Multiply-accumulates of one run, for networks that may be anything."""
    with torch.no_grad(), flop_counter() as counter:
        forward(pixels)
    return int(counter.get_total_flops()) // 2


def _check_choice(backbone: Backbone, name: str, tokens: str, layer: int, layers: int) -> None:
    if tokens not in get_args(TokenChoice):
        raise TeacherError(f"teacher.tokens={tokens!r}: choose {', '.join(get_args(TokenChoice))}")
    if tokens == "projected" and backbone.projected_dim is None:
        raise TeacherError(f"teacher '{name}' has no projection: choose teacher.tokens=norm or block")
    if not 1 <= layer <= backbone.depth:
        raise TeacherError(f"teacher.layer={layer}: '{name}' has {backbone.depth} blocks, choose 1..{backbone.depth}")
    if not 1 <= layers <= layer:
        upto = "" if layer == backbone.depth else f" up to layer {layer}"
        raise TeacherError(f"teacher.layers={layers}: '{name}' has {layer} blocks{upto}, choose 1..{layer}")
