"""Every architecture of timm and open_clip, narrow and two blocks deep, against its library's own forward.

Each one becomes a teacher or is refused in one TeacherError line. A teacher's tokens equal the library's, and its
attention equals the softmax that the library itself computes. So a class that an update renames or adds is noticed.

The fast tests take one network of each structure, the slow ones take all. `--log-cli-level=info` shows their counts.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import TeacherError
from pipeline.meta import meta_device
from pipeline.teachers import Teacher, build_teacher
from pipeline.teachers.timm_vit import TimmBackbone, final_norm

log = logging.getLogger(__name__)

# timm resizes tables of relative positions with calls that torch has advice about.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.searchsorted"),
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence"),
]

# 64 channels a head: what the frequency sections of multimodal rotary positions add up to.
NARROW = {"depth": 2, "embed_dim": 128, "num_heads": 2}
# timm's files with ViTs in them.
MODULES = ("vision_transformer", "eva", "beit", "deit", "vision_transformer_hybrid", "vision_transformer_relpos")
GRID = 3  # patches a side

# Why an architecture is refused. timm's default weights of one were trained with another activation than it builds.
REASONS = ("is no plain ViT with patch tokens", "has no ViT as its vision tower", "were trained with QuickGELU")

# Networks with a class token that focus can't use. By the type of the last block, or of the tower.
WITHOUT_ROW = {
    "ParallelScalingBlock": "attention and MLP share a matrix; timm has no weights for these networks",
    "ParallelThingsBlock": "two attentions a block; timm has no weights for these networks",
    "mean-pooled tower": "CLIPA never reads its class token",
}


class Sweep:
    """Counts what becomes of each architecture, and collects what is wrong."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []

    def show(self, spec: str, build: Callable[[], Teacher], shake: Callable[..., Any]) -> None:
        """Build one teacher and compare it with its library."""
        try:
            teacher = build()
        except TeacherError as error:
            self.counts["refused"] += 1
            if not re.fullmatch(f"teacher .* ({'|'.join(REASONS)}).*: choose .*", str(error)):
                self.faults.append(f"{spec}: {error}")
            return
        self.counts["teachers"] += 1
        shake(teacher.model)
        compare = compare_with_timm if isinstance(teacher.backbone, TimmBackbone) else compare_with_open_clip
        kind, fault = compare(teacher)
        self.counts[kind if teacher.has_attention else "no row"] += 1
        if fault:
            self.faults.append(f"{spec}: {fault}")


def caught_maps(run: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """What `run` returns, and the softmax map [B,H,Q,N] of every attention in it, in double precision."""
    maps: list[Tensor] = []
    original = F.scaled_dot_product_attention

    def catch(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *args: Any, **options: Any) -> Tensor:
        assert options.get("scale") is None
        logits = q.double() @ k.double().mT / q.shape[-1] ** 0.5
        maps.append((logits if attn_mask is None else logits + attn_mask).softmax(-1))
        return original(q, k, v, attn_mask, *args, **options)

    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(F, "scaled_dot_product_attention", catch)
            return run(), maps
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def compare_with_timm(teacher: Teacher) -> tuple[str, str | None]:
    """Which row a timm teacher focuses by, and what is wrong with its tokens or its row."""
    model: Any = teacher.model
    images = random_views(teacher)
    tokens, attention, _, summary = teacher(images)
    pixels = teacher.prepare(images)
    features, maps = caught_maps(lambda: model.forward_features(pixels))
    norm = final_norm(model)
    if norm is not model.norm:
        features = norm(features)
    expected = features[:, model.num_prefix_tokens :]
    if not torch.allclose(tokens, expected, atol=1e-5, rtol=1e-5):
        return "no row", f"tokens differ by {(tokens - expected).abs().max()}"
    has_class = getattr(model, "cls_token", None) is not None
    if has_class != (summary is not None) or (
        summary is not None and not torch.allclose(summary, features[:, :1], atol=1e-5, rtol=1e-5)
    ):
        return "no row", "its summary is not the class token"
    if has_class:
        rows = maps[-1][:, :, 0]
        return "class row", row_fault(attention, rows, type(model.blocks[-1]).__name__)
    if getattr(model, "attn_pool", None) is not None:
        _, maps = caught_maps(lambda: model.forward_head(features))
        return "pooling row", row_fault(attention, maps[0].mean(2), "pooling head")
    return "no row", None if attention is None else "has a row of nothing"


def compare_with_open_clip(teacher: Teacher) -> tuple[str, str | None]:
    """The same for open_clip's own towers, all of which have a class token."""
    visual: Any = teacher.model
    images = random_views(teacher)
    tokens, attention, _, summary = teacher(images)
    pixels = teacher.prepare(images)
    blocks: list[Tensor] = []
    last = visual.transformer.resblocks[-1]
    handle = last.register_forward_hook(lambda _module, _args, output: blocks.append(output))
    _, maps = caught_maps(lambda: visual(pixels))
    handle.remove()
    norm = visual.ln_post if visual.attn_pool is None else visual.attn_pool.ln_k
    expected = norm(blocks[0][:, 1:])
    has_class = visual.attn_pool is None and visual.pool_type == "tok"
    if has_class != (summary is not None) or (
        summary is not None and not torch.allclose(summary, norm(blocks[0][:, :1]), atol=1e-5, rtol=1e-5)
    ):
        return "no row", "its summary is not the class token"
    if not torch.allclose(tokens, expected, atol=1e-5, rtol=1e-5):
        return "no row", f"tokens differ by {(tokens - expected).abs().max()}"
    pooled = visual.attn_pool is None and visual.pool_type == "avg"
    rows = maps[len(visual.transformer.resblocks) - 1][:, :, 0]
    return "class row", row_fault(attention, rows, "mean-pooled tower" if pooled else type(last).__name__)


def row_fault(attention: Tensor | None, rows: Tensor, kind: str) -> str | None:
    """What is wrong with an attention row, given the library's rows [B,H,P+L]."""
    if attention is None or kind in WITHOUT_ROW:
        excused = attention is None and kind in WITHOUT_ROW
        return None if excused else f"no row by {kind}" if attention is None else f"{kind} has a row after all"
    mean = rows[:, :, -attention.shape[1] :].mean(1)
    difference = (attention - mean / mean.sum(-1, keepdim=True)).abs().max()
    return None if difference <= 1e-6 else f"its row differs by {difference}"


def random_views(teacher: Teacher) -> Tensor:
    size, generator = teacher.image_size, torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, generator=generator)


def narrow_options(name: str) -> dict[str, Any]:
    """Arguments that make an architecture small; those of convolutional stems keep the width of their stem."""
    if name.startswith(("vitamin", "vit_base_mci")):
        return {"depth": 2}
    return NARROW | ({"num_kv_heads": (2, 1)} if "sapiens2" in name else {})


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ViT of timm and open_clip narrow and shallow. Networks that know no depth stay as they are."""
    create = timm.create_model

    def create_narrow(name: str, **options: Any) -> Any:
        try:
            return create(name, **narrow_options(name), **options)
        except TypeError:  # no ViT
            return create(name, **options)

    monkeypatch.setattr(timm, "create_model", create_narrow)
    configs = open_clip.factory._MODEL_CONFIGS.values()
    for vision in (config["vision_cfg"] for config in configs):
        if isinstance(vision.get("layers"), int):
            for key, value in {"layers": 2, "width": 128, "head_width": 64}.items():
                monkeypatch.setitem(vision, key, value)


def structure_of(model: Any) -> tuple[Any, ...]:
    """What networks must have in common for a comparison of one to hold for all: layers, tensors and switches."""
    last = model.blocks[-1] if hasattr(model, "blocks") else model
    attn = getattr(last, "attn", None)
    switches = ("rotate_half", "num_kv_groups", "qkv_bias_separate", "dynamic_img_size", "rope_mixed", "no_embed_class")
    return (
        frozenset(type(module) for module in model.modules()),
        frozenset(name for name, _ in last.named_parameters()),
        frozenset(name for name, _ in model.named_parameters() if "blocks." not in name),
        tuple(getattr(owner, switch, None) for owner in (model, attn) for switch in switches),
        getattr(model, "num_prefix_tokens", 0) > 1,
    )


def one_of_each(names: list[str], build: Callable[[str], Any]) -> list[str]:
    """The first name of each structure; built on the meta device, which takes no memory and little time."""
    chosen: dict[tuple[Any, ...], str] = {}
    for name in names:
        with meta_device():
            chosen.setdefault(structure_of(build(name)), name)
    return list(chosen.values())


def small_timm(name: str) -> Teacher:
    """A teacher of timm with a grid of few patches."""
    return build_teacher(f"timm:{name}", weights="random", image_size=GRID * patch_of(name))


def small_open_clip(architecture: str) -> Teacher:
    """A teacher of open_clip. Its tag decides the activation, so the first tag is as good as any."""
    vision = open_clip.get_model_config(architecture)["vision_cfg"]
    patch = vision.get("patch_size") or patch_of(vision.get("timm_model_name", ""))
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    spec = ":".join(["open_clip", architecture, *tags[:1]])
    return build_teacher(spec, weights="random", image_size=GRID * patch)


def patch_of(name: str) -> int:
    """Pixels a side of a patch, or a multiple of that: the strides of convolutional stems stand in no one way."""
    stated = re.search(r"patch(\d+)", name)
    return int(stated[1]) if stated else 32


def vits_of_timm() -> list[str]:
    return [name for module in MODULES for name in timm.list_models(module=module)]


def sweep(names: list[str], build: Callable[[str], Teacher], shake: Callable[..., Any]) -> Counter[str]:
    """Show every network; returns how many became teachers, and by which rows they focus."""
    swept = Sweep()
    for name in names:
        swept.show(name, lambda name=name: build(name), shake)
    log.info("%s", dict(swept.counts))
    assert not swept.faults, "\n".join(swept.faults)
    return swept.counts


@pytest.mark.usefixtures("narrow")
def test_one_network_of_each_structure_in_timm(shake: Callable[..., Any]) -> None:
    names = one_of_each(vits_of_timm(), lambda name: timm.create_model(name, num_classes=0))
    counts = sweep(names, small_timm, shake)
    assert counts["teachers"] >= 60
    assert counts["class row"] >= 40


@pytest.mark.usefixtures("narrow")
def test_one_network_of_each_kind_in_open_clip(shake: Callable[..., Any]) -> None:
    """One for each set of options. Its towers of timm are in the other sweep."""
    kinds: dict[frozenset[str], str] = {}
    for name in open_clip.list_models():
        kinds.setdefault(frozenset(open_clip.get_model_config(name)["vision_cfg"]), name)
    counts = sweep(list(kinds.values()), small_open_clip, shake)
    assert counts["teachers"] >= 6
    assert counts["class row"] >= 5


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_every_network_of_timm(shake: Callable[..., Any]) -> None:
    sweep(timm.list_models(), small_timm, shake)


@pytest.mark.slow  # builds towers of full width where a convolutional stem decides it
@pytest.mark.usefixtures("narrow")
def test_every_network_of_open_clip(shake: Callable[..., Any]) -> None:
    sweep(open_clip.list_models(), small_open_clip, shake)
