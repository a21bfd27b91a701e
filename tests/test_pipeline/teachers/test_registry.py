"""Names, prefixes and the table of `mrmae teachers`."""

import pytest

from pipeline.errors import TeacherError
from pipeline.teachers import TEACHERS, Entry, build_teacher, list_teachers


def test_the_table_needs_no_weights() -> None:
    rows = {row.name: row for row in list_teachers()}
    assert rows.keys() == TEACHERS.keys()
    assert {row.grid for row in rows.values()} == {(14, 14)}
    assert [rows[name].dim for name in ("dino_vits16", "clip_vitb16", "clip_vitl14")] == [384, 768, 1024]
    assert rows["clip_vitl14"].image_size == rows["dinov2_vitb14"].image_size == 196
    assert rows["dino_vitb16"].bytes_per_view == 196 * 768 + 2 * 196 + 2 * 196
    # ViT-B/16 by hand: 12·(197·12·768² + 2·197²·768) + 196·768·768
    assert rows["dino_vitb16"].gmacs == pytest.approx(17.563, abs=1e-3)


@pytest.mark.parametrize("name", ["dino_vits16", "dinov2_vits14"])
def test_the_table_agrees_with_the_teacher(name: str) -> None:
    row = next(row for row in list_teachers() if row.name == name)
    teacher = build_teacher(name, weights="random")
    assert (row.grid, row.dim, row.image_size) == (teacher.grid, teacher.dim, teacher.image_size)
    assert row.gmacs == pytest.approx(teacher.gmacs)


def test_random_weights_are_the_same_each_time() -> None:
    digests = {build_teacher("dino_vits16", weights="random").weights_sha256 for _ in range(2)}
    assert len(digests) == 1


def test_one_entry_adds_a_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEACHERS, "mine", Entry("timm:vit_tiny_patch16_224", 64, "an example"))
    teacher = build_teacher("mine", weights="random")
    assert (teacher.name, teacher.spec, teacher.grid) == ("mine", "mine", (4, 4))
    assert "mine" in {row.name for row in list_teachers()}


def test_an_entrys_size_is_a_default() -> None:
    assert build_teacher("dinov2_vits14", weights="random", image_size=224).grid == (16, 16)


def test_prefixed_names_are_fit_for_files() -> None:
    assert build_teacher("timm:vit_tiny_patch16_224", weights="random").name == "vit_tiny_patch16_224"
    assert build_teacher("open_clip:ViT-B-32:laion2b_e16", weights="random").name == "ViT-B-32-laion2b_e16"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dino_vitb", "unknown teacher 'dino_vitb': did you mean dino_vitb16"),
        ("resnet", "choose dino_vits16, .*timm:<name>"),
        ("timm:", "unknown teacher 'timm:'"),
        ("", "unknown teacher ''"),
    ],
)
def test_unknown_specs_list_near_names(spec: str, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        build_teacher(spec)
