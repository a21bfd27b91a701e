"""A teacher: uint8 views in; patch tokens, and the row of attention that focus samples by, out.

    teacher = build_teacher("dino_vitb16")
    tokens, attention, _ = teacher(views)  # uint8 [B,3,S,S] -> fp32 [B,L,D], [B,L]

One walk: `prepare` (pixels, resized and normalised for this very network) → `trace` (the one forward) → `read`
(which tokens, which row). What differs between libraries is a `Backbone`; there is one a file beside this one.
"""

import importlib.metadata
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import PipelineError, TeacherError
from pipeline.teachers.attention import patches_only
from pipeline.weights import state_digest

TokenChoice = Literal["norm", "block", "projected"]
RESIZE_FILTER = "bicubic, antialiased, clamped to 0..255, not rounded"


class TeacherOutput(NamedTuple):
    """What a teacher says about a batch; L patches lie in row-major order of the grid."""

    tokens: Tensor  # [B,L,D] fp32
    attention: Tensor | None  # [B,L] fp32, rows sum to 1; None where the model has nothing to focus by
    attention_heads: Tensor | None = None  # [B,H,L] fp32, each head's own share of the patches; only on request


class Trace(NamedTuple):
    """What one forward leaves to be read, prefix tokens included."""

    blocks: tuple[Tensor, ...]  # outputs of the last k blocks, oldest first, each [B,P+L,D]
    rows: Tensor | None  # [B,H,P+L] fp32, the attention row of every head
    final: Tensor | None = None  # [B,L,D], the last block normed, from a network that hands that out itself


class Backbone(Protocol):
    """A ViT of whatever library, behind the few things that a teacher needs of it. All of them are `nn.Module`s."""

    model: nn.Module
    library: str  # the package it comes from, for the fingerprint
    image_size: int  # pixels a side
    grid: tuple[int, int]  # patches, rows × columns
    dim: int  # channels of a block's output
    projected_dim: int | None  # channels after the model's projection, None when it has none
    depth: int
    num_heads: int
    num_prefix: int  # class and register tokens before the patches
    has_attention: bool
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
    """A frozen ViT that is shown uint8 views; always in eval mode, never with gradients.

    Args:
        backbone: the network.
        spec: how the user named it; `name` is its short form for tables and file names.
        weights: what the weights are called: a file's name, a hub id or "random".
        tokens: which tokens are read: last block after the final norm, the raw block, or after the projection.
        layers: the mean of the last so many blocks, each normed (and projected) by itself.
        dtype: autocast precision of the forward; the weights, the attention row and the outputs stay fp32.
        compile: let torch.compile take the forward.

    Raises:
        TeacherError: `tokens` or `layers` ask for what this model doesn't have.
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
        layers: int = 1,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
    ) -> None:
        super().__init__()
        _check_choice(backbone, name, tokens, layers)
        self.backbone = backbone
        self.spec, self.name, self.weights = spec, name, weights
        self.tokens, self.layers, self.dtype = tokens, layers, dtype
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
        """Where it lives, and where it expects its views."""
        return self.pixel_mean.device

    @property
    def grid(self) -> tuple[int, int]:
        """Patches, rows × columns; L is their product."""
        return self.backbone.grid

    @property
    def dim(self) -> int:
        """D, channels of a token as it is read."""
        projected = self.backbone.projected_dim
        return projected if self.tokens == "projected" and projected is not None else self.backbone.dim

    @property
    def image_size(self) -> int:
        """Pixels a side that the network itself sees; views of another size are resized to it."""
        return self.backbone.image_size

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of its training pixels in 0..1, one a channel."""
        return self.backbone.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of its training pixels in 0..1, one a channel."""
        return self.backbone.std

    @property
    def has_attention(self) -> bool:
        """Whether there is a row to focus by. If not, pre-train with `focus: random`."""
        return self.backbone.has_attention

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

    def trace(self, views: Tensor, layers: int | None = None) -> Trace:
        """The forward, run once; `read` picks from it. `layers` defaults to what this teacher reads."""
        reduced = self.dtype != torch.float32
        autocast = torch.autocast(views.device.type, self.dtype) if reduced else nullcontext()
        with torch.no_grad():
            pixels = self.prepare(views)
            with autocast:
                return self._trace(pixels, layers or self.layers)

    def read(self, trace: Trace, heads: bool = False) -> TeacherOutput:
        """Pick tokens and attention from a forward of these very weights. No gradients."""
        prefix = self.backbone.num_prefix
        with torch.no_grad():
            if trace.final is not None and self.tokens == "norm" and self.layers == 1:
                tokens = trace.final.float()
            else:
                read = [self._choose(block[:, prefix:].float()) for block in trace.blocks[-self.layers :]]
                tokens = read[0] if len(read) == 1 else torch.stack(read).mean(dim=0)
            if trace.rows is None:
                return TeacherOutput(tokens, None)
            return TeacherOutput(tokens, patches_only(trace.rows, prefix), trace.rows[:, :, prefix:] if heads else None)

    def forward(self, views: Tensor, heads: bool = False) -> TeacherOutput:
        """Look at uint8 RGB views [B,3,S,S] on this teacher's device; see `TeacherOutput` for what comes back.

        Args:
            views: any S; resized by `resize_views` when it isn't `image_size`.
            heads: also return every head's row, prefix columns dropped, not renormalised.

        Raises:
            TeacherError: views of another type or shape.
        """
        return self.read(self.trace(views), heads)

    def identity(self) -> dict[str, Any]:
        """All that decides what this teacher says, JSON-able, for a cache's fingerprint."""
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
            "mean": list(self.mean),
            "std": list(self.std),
            "libraries": library_versions(backbone.library),
        } | ({"compile": True} if self.compiled else {})

    @property
    def weights_sha256(self) -> str:
        """Digest of the weights, whatever file they came from; computed once (about 1 s a GB).

        Of what was resampled to `image_size` the file's tensors count: a resampling's last bits depend on the CPU.
        """
        if self._digest is None:
            self._digest = state_digest({**self.backbone.state_dict(), **self.backbone.native})
        return self._digest

    def recognises(self, digest: str) -> bool:
        """Whether a recorded digest is of these weights; if it is, it is this teacher's from now on.

        Caches of before hold the digest of the resampled tensors, and go on as the caches that they are.
        """
        if self.backbone.native and digest == state_digest(self.backbone.state_dict()):
            self._digest = digest
        return digest == self.weights_sha256

    def _choose(self, block: Tensor) -> Tensor:
        """Block output [B,L,D] → the tokens asked for, fp32."""
        if self.tokens == "block":
            return block
        normed = self.backbone.norm(block)
        return normed if self.tokens == "norm" else self.backbone.project(normed)


def resize_views(views: Tensor, size: int) -> Tensor:
    """uint8 [B,3,S,S] → fp32 [B,3,size,size] in 0..255, exact where S is `size` already.

    Otherwise antialiased bicubic, clamped because bicubic overshoots. The cache's fingerprint names this filter.
    """
    pixels = views.float()
    if views.shape[-2:] == (size, size):
        return pixels
    return F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)


def rehearse(name: str, build: Callable[[], Teacher]) -> None:
    """Build a teacher and run it on one black view, so that one that can't speak is refused before its weights come.

    On the meta device this takes no memory and little time, and finds what shapes and missing members can tell.

    Raises:
        TeacherError: the build or the forward fails, or gives other shapes than the teacher states.
    """
    try:
        teacher = build()
        size = teacher.image_size
        tokens, attention, _ = teacher(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=teacher.device))
    except PipelineError:
        raise
    except Exception as error:
        reason = (str(error).strip().partition("\n")[0] or "no reason given")[:120]
        raise TeacherError(
            f"teacher '{name}' can't be run ({type(error).__name__}: {reason}): choose another model, or another "
            "image_size"
        ) from error
    length = teacher.grid[0] * teacher.grid[1]
    if tokens.shape != (1, length, teacher.dim) or (attention is not None and attention.shape != (1, length)):
        raise TeacherError(
            f"teacher '{name}' gives tokens {list(tokens.shape[1:])} and not one of {teacher.dim} channels for "
            f"each of {length} patches: choose a plain ViT"
        )


def look_together(teachers: Sequence[Teacher], views: Tensor, heads: bool = False) -> list[TeacherOutput]:
    """Run several teachers on one batch; those that hold one backbone (see `share_backbones`) share its forward.

    Each output equals, bit for bit, what the teacher would say alone.
    """
    traces: dict[tuple[int, torch.dtype], Trace] = {}
    outputs = []
    for teacher in teachers:
        key = (id(teacher.backbone), teacher.dtype)
        if key not in traces:
            same = [t.layers for t in teachers if (id(t.backbone), t.dtype) == key]
            traces[key] = teacher.trace(views, max(same))
        outputs.append(teacher.read(traces[key], heads))
    return outputs


def share_backbones(teachers: Sequence[Teacher]) -> int:
    """Let teachers of one network, weights and input hold one backbone; return how many forwards remain for a batch.

    Frees the copies: two token choices of one ViT then cost one forward and one set of weights. Equal weights are not
    enough: another activation, as CLIP's QuickGELU, has no parameters, so the specs must be equal too.
    """
    first: dict[tuple[object, ...], Teacher] = {}
    for teacher in teachers:
        how = (teacher.spec, teacher.weights_sha256, teacher.compiled, teacher.device)
        key = (*how, teacher.image_size, teacher.mean, teacher.std)
        original = first.setdefault(key, teacher)
        teacher.backbone, teacher._trace = original.backbone, original._trace
    return len({(id(teacher.backbone), teacher.dtype) for teacher in teachers})


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


def library_versions(library: str) -> dict[str, str]:
    """Versions of torch and of the package that the network comes from."""
    versions: dict[str, str] = {"torch": str(torch.__version__)}
    distribution = {"timm": "timm", "open_clip": "open_clip_torch"}.get(library)
    if distribution is not None:
        versions[library] = importlib.metadata.version(distribution)
    return versions


def _check_choice(backbone: Backbone, name: str, tokens: str, layers: int) -> None:
    if tokens not in ("norm", "block", "projected"):
        raise TeacherError(f"teacher.tokens={tokens!r}: choose norm, block or projected")
    if tokens == "projected" and backbone.projected_dim is None:
        raise TeacherError(f"teacher '{name}' has no projection: choose teacher.tokens=norm or block")
    if not 1 <= layers <= backbone.depth:
        raise TeacherError(f"teacher.layers={layers}: '{name}' has {backbone.depth} blocks, choose 1..{backbone.depth}")
