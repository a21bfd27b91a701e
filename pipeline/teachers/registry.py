"""Every teacher by name. A new one is one entry of `TEACHERS`; anything else goes by a prefix. See docs/teachers.md."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from pipeline.errors import PipelineError, TeacherError, suggest
from pipeline.teachers.clip import build_open_clip
from pipeline.teachers.mrmae import build_mrmae
from pipeline.teachers.teacher import Backbone, Teacher, TokenChoice
from pipeline.teachers.timm_vit import build_timm


@dataclass(frozen=True)
class Entry:
    """A short name for a prefixed spec.

    Attributes:
        spec: `timm:<name>` or `open_clip:<arch>:<tag>`.
        image_size: pixels a side, None for the model's own. At 196, 14-pixel patches make the students' 14×14 grid.
        about: one line for `mrmae teachers`.
    """

    spec: str
    image_size: int | None
    about: str


TEACHERS: dict[str, Entry] = {
    "dino_vits16": Entry("timm:vit_small_patch16_224.dino", 224, "DINO v1 (arXiv 2104.14294)"),
    "dino_vitb16": Entry("timm:vit_base_patch16_224.dino", 224, "DINO v1 (arXiv 2104.14294)"),
    "clip_vitb16": Entry("open_clip:ViT-B-16-quickgelu:openai", 224, "OpenAI CLIP (arXiv 2103.00020)"),
    "clip_vitl14": Entry("open_clip:ViT-L-14-quickgelu:openai", 196, "OpenAI CLIP (arXiv 2103.00020)"),
    "dinov2_vits14": Entry("timm:vit_small_patch14_dinov2.lvd142m", 196, "DINOv2 (arXiv 2304.07193)"),
    "dinov2_vitb14": Entry("timm:vit_base_patch14_dinov2.lvd142m", 196, "DINOv2 (arXiv 2304.07193)"),
}
PREFIXES = ("timm:<name>", "open_clip:<arch>:<tag>", "mrmae:<checkpoint>")


class TeacherRow(NamedTuple):
    """A line of `mrmae teachers`."""

    name: str
    grid: tuple[int, int]
    dim: int
    image_size: int  # pixels a side
    gmacs: float  # billions of multiply-accumulates a view
    bytes_per_view: int  # in an int8 cache: tokens, and an fp16 scale and attention a token
    about: str


def build_teacher(
    spec: str,
    weights: str | Path | None = None,
    image_size: int | None = None,
    tokens: TokenChoice = "norm",
    layers: int = 1,
    module: nn.Module | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
) -> Teacher:
    """Build a frozen teacher. Before its weights are read or fetched, its network runs once on the meta device.

    Args:
        spec: a name in `TEACHERS`, `timm:<name>`, `open_clip:<arch>:<tag>` or `mrmae:<checkpoint>`.
        weights: None downloads from the hub, a path reads a local file, "random" seeds fresh ones for tests.
        image_size: input pixels a side; position embeddings are resampled. None for the entry's or model's own.
        tokens: "norm" (last block after the final norm), "block" (raw), "projected" (normed, then projected).
        layers: mean of this many last blocks.
        module: the loaded encoder of a `mrmae:` teacher, a `PatchEncoder`.
        device: of the weights and the views.
        dtype: autocast precision of the forward: torch.float32, or torch.bfloat16 on CUDA.
        compile: use torch.compile, which costs a minute once and is faster after.

    Raises:
        TeacherError: unknown spec, weights that can't be had or don't fit, a choice that the model doesn't offer, a
            network that can't be built or run.
    """
    source = None if weights is None else str(Path(weights).expanduser())
    name = spec if spec in TEACHERS else _short_name(spec)

    def build(weights: str | None, **options: Any) -> Teacher:
        backbone, label = _build_backbone(spec, weights, image_size, module)
        return Teacher(backbone, spec=spec, name=name, weights=label, tokens=tokens, layers=layers, **options)

    if module is None and not spec.startswith("mrmae:"):
        with torch.device("meta"):
            _dry_run(name, lambda: build("random"))
    teacher = build(source, dtype=dtype, compile=compile)
    if module is not None:
        _dry_run(name, lambda: teacher)
    return teacher.to(device)


def _dry_run(name: str, build: Callable[[], Teacher]) -> None:
    """Build a teacher and run it on one black view, to refuse a network that can't run before its weights are fetched.

    On the meta device this takes no memory and little time; it finds wrong shapes and missing members.

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


def list_teachers() -> list[TeacherRow]:
    """What each named teacher costs. Built on the meta device, without memory or weights, in about a second."""
    rows = []
    for name, entry in TEACHERS.items():
        with torch.device("meta"):
            backbone, _ = _build_backbone(name, "random", None, None)
        length = backbone.grid[0] * backbone.grid[1]
        size = length * backbone.dim + 2 * length + 2 * length
        rows.append(
            TeacherRow(name, backbone.grid, backbone.dim, backbone.image_size, backbone.macs() / 1e9, size, entry.about)
        )
    return rows


def _build_backbone(
    spec: str, weights: str | None, image_size: int | None, module: nn.Module | None
) -> tuple[Backbone, str]:
    """The network behind a spec, and the name of its weights."""
    entry = TEACHERS.get(spec)
    if entry is not None:
        return _build_backbone(entry.spec, weights, image_size or entry.image_size, module)
    prefix, _, name = spec.partition(":")
    if name and prefix == "timm":
        return build_timm(name, weights, image_size)
    if name and prefix == "open_clip":
        return build_open_clip(name, weights, image_size)
    if name and prefix == "mrmae":
        if weights is not None:
            raise TeacherError(f"teacher '{spec}' has its weights in its checkpoint: leave teacher.weights out")
        return build_mrmae(name, module, image_size)
    hint = suggest(spec, TEACHERS, f"choose {', '.join(TEACHERS)}, or {', '.join(PREFIXES)}")
    raise TeacherError(f"unknown teacher '{spec}': {hint}")


def _short_name(spec: str) -> str:
    """`timm:vit_tiny…` → `vit_tiny…`, `mrmae:runs/a/last.safetensors` → `last`: a name fit for tables and files."""
    prefix, _, name = spec.partition(":")
    return Path(name).stem if prefix == "mrmae" else name.replace(":", "-").replace("/", "-")
