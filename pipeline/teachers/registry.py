"""Every teacher by name. A new one is an entry of `TEACHERS`; others go by a prefix. See docs/teachers.md."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from pipeline.configs.teachers import TokenChoice
from pipeline.errors import PipelineError, TeacherError, suggest
from pipeline.meta import meta_device
from pipeline.teachers.clip import build_open_clip
from pipeline.teachers.modules import ModuleEntry, build_module
from pipeline.teachers.mrmae import build_mrmae
from pipeline.teachers.teacher import Backbone, Teacher
from pipeline.teachers.timm_vit import build_timm


@dataclass(frozen=True)
class Entry:
    """A short name for a prefixed spec.

    Attributes:
        spec: `timm:<name>` or `open_clip:<arch>:<tag>`.
        image_size: pixels a side, None for the model's own. At 196, 14-pixel patches make the students' 14×14 grid.
        about: one line for `mrmae teachers`.
        licence: of the weights, as timm's entry of them names it.
    """

    spec: str
    image_size: int | None
    about: str
    licence: str = "see the model card"


# What a family is, and the licence of its weights.
DINO = ("DINO v1 (arXiv 2104.14294)", "apache-2.0")
CLIP = ("OpenAI CLIP (arXiv 2103.00020)", "apache-2.0")
DINOV2 = ("DINOv2 (arXiv 2304.07193)", "apache-2.0")
DINOV2_REGISTERS = ("DINOv2 with 4 registers (arXiv 2309.16588)", "apache-2.0")
DINOV3 = ("DINOv3 (arXiv 2508.10104)", "dinov3-license")
SIGLIP2 = ("SigLIP 2 (arXiv 2502.14786)", "apache-2.0")
PE_CORE = ("Perception Encoder, core (arXiv 2504.13181)", "apache-2.0")
PE_SPATIAL = ("Perception Encoder, spatial (arXiv 2504.13181)", "apache-2.0")
DFN = ("CLIP on DFN-2B (arXiv 2309.17425)", "apple-ascl")
METACLIP2 = ("MetaCLIP 2 (arXiv 2507.22062)", "cc-by-nc-4.0")
EVA02 = ("EVA-02 CLIP (arXiv 2303.11331)", "mit")
MOBILECLIP2 = ("MobileCLIP2 (arXiv 2508.20691)", "apple-amlr")
AIMV2 = ("AIMv2 (arXiv 2411.14402)", "apple-ascl")
RADIO_V3 = ("C-RADIO v3 (arXiv 2412.07679)", "nvidia-open-model-license")
RADIO_V4 = ("C-RADIO v4 (arXiv 2412.07679)", "nvidia-open-model-license")

TEACHERS: dict[str, Entry | ModuleEntry] = {
    "dino_vits16": Entry("timm:vit_small_patch16_224.dino", 224, *DINO),
    "dino_vitb16": Entry("timm:vit_base_patch16_224.dino", 224, *DINO),
    "clip_vitb16": Entry("open_clip:ViT-B-16-quickgelu:openai", 224, *CLIP),
    "clip_vitl14": Entry("open_clip:ViT-L-14-quickgelu:openai", 196, *CLIP),
    "dinov2_vits14": Entry("timm:vit_small_patch14_dinov2.lvd142m", 196, *DINOV2),
    "dinov2_vitb14": Entry("timm:vit_base_patch14_dinov2.lvd142m", 196, *DINOV2),
    "dinov2_reg_vits14": Entry("timm:vit_small_patch14_reg4_dinov2.lvd142m", 196, *DINOV2_REGISTERS),
    "dinov2_reg_vitb14": Entry("timm:vit_base_patch14_reg4_dinov2.lvd142m", 196, *DINOV2_REGISTERS),
    "dinov2_reg_vitl14": Entry("timm:vit_large_patch14_reg4_dinov2.lvd142m", 196, *DINOV2_REGISTERS),
    "dinov2_reg_vitg14": Entry("timm:vit_giant_patch14_reg4_dinov2.lvd142m", 196, *DINOV2_REGISTERS),
    "dinov3_vits16": Entry("timm:vit_small_patch16_dinov3.lvd1689m", 224, *DINOV3),
    "dinov3_vits16plus": Entry("timm:vit_small_plus_patch16_dinov3.lvd1689m", 224, *DINOV3),
    "dinov3_vitb16": Entry("timm:vit_base_patch16_dinov3.lvd1689m", 224, *DINOV3),
    "dinov3_vitl16": Entry("timm:vit_large_patch16_dinov3.lvd1689m", 224, *DINOV3),
    "dinov3_vith16plus": Entry("timm:vit_huge_plus_patch16_dinov3.lvd1689m", 224, *DINOV3),
    "dinov3_vit7b16": Entry("timm:vit_7b_patch16_dinov3.lvd1689m", 224, *DINOV3),
    "siglip2_vitb16": Entry("timm:vit_base_patch16_siglip_224.v2_webli", 224, *SIGLIP2),
    "siglip2_vitl16": Entry("timm:vit_large_patch16_siglip_256.v2_webli", 224, *SIGLIP2),
    "siglip2_so400m16": Entry("timm:vit_so400m_patch16_siglip_256.v2_webli", 224, *SIGLIP2),
    "siglip2_giantopt16": Entry("timm:vit_giantopt_patch16_siglip_256.v2_webli", 224, *SIGLIP2),
    "pe_core_vitb16": Entry("timm:vit_pe_core_base_patch16_224.fb", 224, *PE_CORE),
    "pe_core_vitl14": Entry("timm:vit_pe_core_large_patch14_336.fb", 196, *PE_CORE),
    "pe_core_vitg14": Entry("timm:vit_pe_core_gigantic_patch14_448.fb", 196, *PE_CORE),
    "pe_spatial_vitb16": Entry("timm:vit_pe_spatial_base_patch16_512.fb", 224, *PE_SPATIAL),
    "pe_spatial_vitl14": Entry("timm:vit_pe_spatial_large_patch14_448.fb", 196, *PE_SPATIAL),
    "pe_spatial_vitg14": Entry("timm:vit_pe_spatial_gigantic_patch14_448.fb", 196, *PE_SPATIAL),
    "dfn_vitb16": Entry("open_clip:ViT-B-16-quickgelu:dfn2b", 224, *DFN),
    "metaclip2_vith14": Entry("open_clip:ViT-H-14-worldwide-quickgelu:metaclip2_worldwide", 196, *METACLIP2),
    "metaclip2_vitg14": Entry("open_clip:ViT-bigG-14-worldwide:metaclip2_worldwide", 196, *METACLIP2),
    "eva02_clip_vitb16": Entry("open_clip:EVA02-B-16:merged2b_s8b_b131k", 224, *EVA02),
    "eva02_clip_vitl14": Entry("open_clip:EVA02-L-14:merged2b_s4b_b131k", 196, *EVA02),
    "eva02_clip_vite14": Entry("open_clip:EVA02-E-14-plus:laion2b_s9b_b144k", 196, *EVA02),
    "mobileclip2_vitb16": Entry("open_clip:MobileCLIP2-B:dfndr2b", 224, *MOBILECLIP2),
    "aimv2_vitl14": Entry("timm:aimv2_large_patch14_224.apple_pt", 196, *AIMV2),
    "aimv2_vith14": Entry("timm:aimv2_huge_patch14_224.apple_pt", 196, *AIMV2),
    "aimv2_vit1b14": Entry("timm:aimv2_1b_patch14_224.apple_pt", 196, *AIMV2),
    "c_radio_v3_vitb16": Entry("timm:vit_base_patch16_radio_v3.c_radio", 224, *RADIO_V3),
    "c_radio_v3_vitl16": Entry("timm:vit_large_patch16_radio_v3.c_radio", 224, *RADIO_V3),
    "c_radio_v4_so400m16": Entry("timm:vit_so400m_patch16_radio_v4.c_radio", 224, *RADIO_V4),
    "c_radio_v4_vith16": Entry("timm:vit_huge_patch16_radio_v4.c_radio", 224, *RADIO_V4),
}
# What a model without a row to focus by means for a run; said before a cache is made.
NO_ATTENTION = (
    "it has no attention to focus by, and its cache will hold none; pre-train with mask.focus=random, or together with "
    "the cache of a teacher that has attention (caches.NAME.path=...)"
)
PREFIXES = ("timm:<name>", "open_clip:<arch>:<tag>", "mrmae:<checkpoint>")


class TeacherRow(NamedTuple):
    """What a teacher costs and offers."""

    name: str
    grid: tuple[int, int]
    dim: int
    image_size: int  # pixels a side
    gmacs: float  # billions of multiply-accumulates a view
    bytes_per_view: int  # in an int8 cache: tokens, and an fp16 scale and attention a token
    has_attention: bool  # whether masks can be drawn by it
    has_summary: bool  # whether it has a class token
    about: str
    licence: str


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
    layer: int | None = None,
) -> Teacher:
    """Build a frozen teacher. Before its weights are read or fetched, its network runs once on the meta device.

    Args:
        spec: a name in `TEACHERS`, `timm:<name>`, `open_clip:<arch>:<tag>` or `mrmae:<checkpoint>`.
        weights: None downloads from the hub, a path reads a local file, "random" seeds fresh ones for tests.
        image_size: input pixels a side; position embeddings are resampled. None for the entry's or model's own.
        tokens: "norm" (last block after the final norm), "block" (raw), "projected" (normed, then projected).
        layers: mean of this many blocks, `layer` and those before it.
        module: the loaded encoder of a `mrmae:` teacher, a `PatchEncoder`.
        device: of the weights and the views.
        dtype: autocast precision of the forward: torch.float32, or torch.bfloat16 on CUDA.
        compile: use torch.compile, which costs a minute once and is faster after.
        layer: the block that is read, counted from 1; None for the last one.

    Raises:
        TeacherError: unknown spec, weights that can't be had or don't fit, a choice that the model doesn't offer, a
            network that can't be built or run.
    """
    source = None if weights is None else os.path.expanduser(weights)
    name = spec if spec in TEACHERS else _short_name(spec)

    def build(weights: str | None, **options: Any) -> Teacher:
        backbone, label = _build_backbone(spec, weights, image_size, module)
        choice: dict[str, Any] = {"tokens": tokens, "layer": layer, "layers": layers}
        return Teacher(backbone, spec=spec, name=name, weights=label, **choice, **options)

    if module is None and not spec.startswith("mrmae:") and not isinstance(TEACHERS.get(spec), ModuleEntry):
        with meta_device():
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
        output = teacher(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=teacher.device))
    except PipelineError:
        raise
    except Exception as error:
        reason = (str(error).strip().partition("\n")[0] or "no reason given")[:120]
        raise TeacherError(
            f"teacher '{name}' can't be run ({type(error).__name__}: {reason}): choose another model, or another "
            "image_size"
        ) from error
    length = teacher.grid[0] * teacher.grid[1]
    found = [None if values is None else values.shape for values in (output.tokens, output.attention, output.summary)]
    expected = [(1, length, teacher.dim), (1, length), (1, 1, teacher.dim)]
    if any(shape not in (None, wanted) for shape, wanted in zip(found, expected, strict=True)):
        raise TeacherError(
            f"teacher '{name}' gives tokens {list(output.tokens.shape[1:])} and not one of {teacher.dim} channels for "
            f"each of {length} patches: choose a plain ViT"
        )


def list_teachers() -> list[TeacherRow]:
    """What each named teacher costs. Takes a few seconds."""
    return [describe_teacher(name) for name in TEACHERS]


def describe_teacher(spec: str) -> TeacherRow:
    """What a teacher costs. It is built on the meta device, without memory or weights.

    Raises:
        TeacherError: as `build_teacher`, but for weights; or a `mrmae:` teacher, which only its checkpoint describes.
    """
    if spec.startswith("mrmae:"):
        raise TeacherError(f"teacher '{spec}' has no figures without its run: name a teacher of timm or open_clip")
    with meta_device():
        backbone, _ = _build_backbone(spec, "random", None, None)
    length = backbone.grid[0] * backbone.grid[1]
    return TeacherRow(
        name=spec,
        grid=backbone.grid,
        dim=backbone.dim,
        image_size=backbone.image_size,
        gmacs=backbone.macs() / 1e9,
        bytes_per_view=length * (backbone.dim + 2 + (2 if backbone.has_attention else 0)),
        has_attention=backbone.has_attention,
        has_summary=backbone.has_summary,
        about=TEACHERS[spec].about if spec in TEACHERS else "",
        licence=TEACHERS[spec].licence if spec in TEACHERS else Entry.licence,
    )


def _build_backbone(
    spec: str, weights: str | None, image_size: int | None, module: nn.Module | None
) -> tuple[Backbone, str]:
    """The network behind a spec, and the name of its weights."""
    entry = TEACHERS.get(spec)
    if isinstance(entry, ModuleEntry):
        return build_module(spec, entry, weights, image_size)
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
    hint = suggest(spec, TEACHERS, f"choose one that `mrmae teachers` lists, or {', '.join(PREFIXES)}")
    plugged = [name for name, entry in TEACHERS.items() if isinstance(entry, ModuleEntry)]
    of_plugins = f" (plug-ins have registered {', '.join(plugged)})" if plugged else ""
    raise TeacherError(f"unknown teacher '{spec}': {hint}{of_plugins}")


def _short_name(spec: str) -> str:
    """`timm:vit_tiny…` → `vit_tiny…`, `mrmae:runs/a/last.safetensors` → `last`: a name fit for tables and files."""
    prefix, _, name = spec.partition(":")
    return Path(name).stem if prefix == "mrmae" else name.replace(":", "-").replace("/", "-")
