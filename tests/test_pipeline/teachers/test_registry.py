"""Names, prefixes and the table of `mrmae teachers`."""

from typing import Any

import open_clip
import pytest
import timm
import torch
from timm.models.eva import Eva

from pipeline.errors import TeacherError
from pipeline.meta import meta_device
from pipeline.teachers import (
    TEACHERS,
    Entry,
    Teacher,
    build_teacher,
    describe_teacher,
    list_teachers,
    registry,
    timm_vit,
)
from pipeline.teachers.teacher import Trace
from pipeline.teachers.timm_vit import TimmBackbone


def test_the_table_needs_no_weights() -> None:
    rows = {row.name: row for row in list_teachers()}
    assert rows.keys() == TEACHERS.keys()
    assert {row.grid for row in rows.values()} == {(14, 14)}
    assert [rows[name].dim for name in ("dino_vits16", "clip_vitb16", "clip_vitl14")] == [384, 768, 1024]
    assert rows["clip_vitl14"].image_size == rows["dinov2_vitb14"].image_size == 196
    assert rows["dino_vitb16"].bytes_per_view == 196 * 768 + 2 * 196 + 2 * 196
    # ViT-B/16 by hand: 12·(197·12·768² + 2·197²·768) + 196·768·768
    assert rows["dino_vitb16"].gmacs == pytest.approx(17.563, abs=1e-3)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("name", TEACHERS)
def test_each_named_teacher_runs(name: str) -> None:
    """On the meta device, three blocks deep. The exceptions have neither class token nor pooling head."""
    shapes = []
    with meta_device():
        registry._dry_run(name, lambda: shapes.append(build_bare(name)) or shapes[0])
    assert shapes[0].grid == (14, 14)
    assert shapes[0].has_attention != name.startswith(("aimv2", "pe_spatial_vitg14"))


def build_bare(name: str) -> Teacher:
    backbone, label = registry._build_backbone(name, "random", None, None)
    return Teacher(backbone, spec=name, name=name, weights=label)


@pytest.mark.parametrize("name", TEACHERS)
def test_licences_are_those_that_timm_names(name: str) -> None:
    """open_clip names none. Most of its weights lie on the hub under timm's name."""
    library, _, model = TEACHERS[name].spec.partition(":")
    if library == "open_clip":
        model = open_clip.get_pretrained_cfg(*model.split(":"))["hf_hub"].strip("/").removeprefix("timm/")
    config = timm.get_pretrained_cfg(TWINS.get(model, model))
    assert TEACHERS[name].licence == config.license


# Weights on the hub → timm's name of them.
TWINS = {
    "apple/DFN2B-CLIP-ViT-B-16": "vit_base_patch16_clip_224.dfn2b",
    "MobileCLIP2-B-OpenCLIP": "vit_base_mci_224.apple_mclip2_dfndr2b",
    "eva02_base_patch16_clip_224.merged2b_s8b_b131k": "eva02_base_patch16_clip_224.merged2b",
    "eva02_large_patch14_clip_224.merged2b_s4b_b131k": "eva02_large_patch14_clip_224.merged2b",
    "eva02_enormous_patch14_plus_clip_224.laion2b_s9b_b144k": "eva02_enormous_patch14_clip_224.laion2b_plus",
}


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("name", ["dino_vits16", "dinov2_vits14"])
def test_the_table_agrees_with_the_teacher(name: str) -> None:
    row = describe_teacher(name)
    teacher = build_teacher(name, weights="random")
    assert (row.grid, row.dim, row.image_size) == (teacher.grid, teacher.dim, teacher.image_size)
    assert row.gmacs == pytest.approx(teacher.gmacs)


@pytest.mark.usefixtures("shallow")
def test_random_weights_are_the_same_each_time() -> None:
    digests = {build_teacher("dino_vits16", weights="random").weights_sha256 for _ in range(2)}
    assert len(digests) == 1


@pytest.mark.usefixtures("shallow")
def test_one_entry_adds_a_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Entry("timm:vit_tiny_patch16_224", 64, "an example")
    monkeypatch.setattr(registry, "TEACHERS", {"dino_vits16": TEACHERS["dino_vits16"], "mine": mine})
    teacher = build_teacher("mine", weights="random")
    assert (teacher.name, teacher.spec, teacher.grid) == ("mine", "mine", (4, 4))
    assert [row.name for row in list_teachers()] == ["dino_vits16", "mine"]


@pytest.mark.usefixtures("shallow")
def test_an_entrys_size_is_a_default() -> None:
    assert build_teacher("dinov2_vits14", weights="random", image_size=224).grid == (16, 16)


@pytest.mark.usefixtures("shallow")
def test_prefixed_names_are_fit_for_files() -> None:
    assert build_teacher("timm:vit_tiny_patch16_224", weights="random").name == "vit_tiny_patch16_224"
    assert build_teacher("open_clip:ViT-B-32:laion2b_e16", weights="random").name == "ViT-B-32-laion2b_e16"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dino_vitb", "unknown teacher 'dino_vitb': did you mean 'dino_vitb16'"),
        ("dinov3_vitb", "did you mean 'dinov3_vitb16'"),
        ("siglip2_b16", "did you mean .*'siglip2_vitb16'"),
        ("pe_core_l14", "did you mean .*'pe_core_vitl14'"),
        ("resnet", "choose one that `mrmae teachers` lists, or timm:<name>"),
        ("timm:", "unknown teacher 'timm:'"),
        ("", "unknown teacher ''"),
    ],
)
def test_unknown_specs_list_near_names(spec: str, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        build_teacher(spec)


@pytest.mark.parametrize("spec", ["timm:test_vit_relpos", "timm:vit_pwee_patch16_reg1_gap_256"])
def test_networks_without_a_row_or_a_prefix_are_teachers_without_attention(spec: str) -> None:
    """No prefix tokens at all, and parallel blocks, whose attention is no module of its own."""
    teacher = build_teacher(spec, weights="random", image_size=32)
    output = teacher(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert output.tokens.shape == (1, teacher.grid[0] * teacher.grid[1], teacher.dim)
    assert output.attention is output.summary is None
    assert not teacher.has_attention
    assert not teacher.has_summary


def test_a_pooling_head_without_prefix_tokens_is_the_focus() -> None:
    """PE-G: an Eva of timm without class token, which always pools all of its tokens."""
    model = Eva(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, class_token=False, global_pool="map")
    teacher = Teacher(TimmBackbone(model, "t", None, (0.5,) * 3, (0.5,) * 3), spec="t", name="t", weights="random")
    attention = teacher(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)).attention
    assert attention is not None
    torch.testing.assert_close(attention.sum(-1), torch.ones(1))


class Broken(TimmBackbone):
    """Builds, and fails when it is run, as a network that the library has changed would."""

    def trace(self, x: torch.Tensor, layers: int) -> Trace:
        raise AttributeError("'Block' object has no attribute 'attn'\nand more")


class Short(TimmBackbone):
    """Gives fewer tokens than its grid has patches."""

    def trace(self, x: torch.Tensor, layers: int) -> Trace:
        return Trace(tuple(block[:, :-1] for block in super().trace(x, layers).blocks), None)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [(Broken, r"can't be run \(AttributeError: .*'attn'\): choose another model"), (Short, r"gives tokens \[99, 64\]")],
)
def test_a_network_is_run_before_its_weights_are_fetched(
    backbone: type[TimmBackbone], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    create = timm.create_model
    monkeypatch.setattr(timm_vit, "TimmBackbone", backbone)
    monkeypatch.setattr(
        timm, "create_model", lambda name, **options: fetched.append(name) or create(name, num_classes=0)
        if options.get("pretrained") else create(name, **options)
    )  # fmt: skip
    with pytest.raises(TeacherError, match=message) as caught:
        build_teacher("timm:test_vit.r160_in1k")
    assert "\n" not in str(caught.value)
    assert fetched == []


@pytest.mark.parametrize("choice", [{"image_size": 40}, {"tokens": "projected"}, {"layers": 99}])
def test_choices_are_checked_before_weights_are_fetched(choice: dict[str, Any]) -> None:
    """Without a network the download would be the first to fail."""
    with pytest.raises(TeacherError, match=r"multiple|no projection|blocks"):
        build_teacher("timm:vit_tiny_patch16_224", **choice)


def test_weights_that_were_trained_with_quickgelu_are_refused_under_a_name_with_gelu() -> None:
    """timm has them under both names, with one file, and the activation has no parameters that could differ."""
    wrong = "vit_base_patch16_clip_224.openai"
    right = "timm:vit_base_patch16_clip_quickgelu_224.openai"
    for weights in (None, "random", "file.safetensors"):
        with pytest.raises(TeacherError, match=f"trained with QuickGELU.*: choose {right}"):
            build_teacher(f"timm:{wrong}", weights=weights)
    noted = [name for name in timm.list_pretrained("*_clip_*") if timm.get_pretrained_cfg(name).notes]
    refused = [name for name in noted if "quickgelu" not in name]
    assert len(refused) >= 17
    for name in refused:
        with pytest.raises(TeacherError, match="QuickGELU"):
            timm_vit.known_config(name)
    assert open_clip.get_pretrained_cfg("ViT-B-16", "dfn2b")["quick_gelu"]  # the same file, without a twin in timm
    with pytest.raises(TeacherError, match="choose open_clip:ViT-B-16-quickgelu:dfn2b"):
        timm_vit.known_config("vit_base_patch16_clip_224.dfn2b")
    for name in ("vit_base_patch16_clip_224.laion2b", "vit_base_patch16_clip_224.openai_ft_in1k", right[5:]):
        timm_vit.known_config(name)
