"""The teacher's class token, from extraction through the cache to the student's loss."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from pipeline.assembly.teachers import load_teacher
from pipeline.cache import open_cache, read_commit, read_header
from pipeline.configs.teachers import TeacherConfig
from pipeline.data.decoding import decode
from pipeline.data.images import open_images
from pipeline.data.views import View, render, to_chw
from pipeline.errors import CacheError, TeacherError
from stages import cache_info, extract_teacher_features, plan, verify_cache
from tests.test_stages.conftest import TEACHER, extract_config
from tests.test_stages.test_extract_teacher_features import content, several

Make = Callable[..., Path]


def verify(path: Path, **options: object) -> verify_cache.Verification:
    return verify_cache.run(verify_cache.VerifyConfig.model_validate({"path": path, **options}))


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_the_class_token_is_one_row_more_and_changes_no_other(make_cache: Make, image_tree: Path, store: str) -> None:
    paths = [make_cache(name, cache__store=store, cache__summary=name == "with") for name in ("with", "without")]
    kept, plain = (open_cache(path) for path in paths)
    teacher = load_teacher(TeacherConfig.model_validate(TEACHER), torch.device("cpu"))
    images = open_images(str(image_tree))
    for index in range(0, 24, 5):
        record, same = kept.read(index, 1), plain.read(index, 1)
        for field in ("tokens", "scale", "attention", "box"):
            np.testing.assert_array_equal(getattr(record, field), getattr(same, field))
        assert same.summary is None
        view = View(tuple(record.box.tolist()), record.hflip)
        image = render(decode(images.read(index)), view, 64) if record.image is None else decode(record.image)
        expected = teacher(to_chw(np.asarray(image)[None].copy())).summary
        assert expected is not None
        stored = torch.from_numpy(kept.read(index, 1, dequantise=True).summary)
        assert cosine_similarity(stored, expected[0]).item() > 0.9999
    figures = [read_commit(path, read_header(path), 0).fidelity for path in paths]
    of_summary = figures[0].pop("summary")
    assert figures[0] == figures[1]
    assert of_summary["tokens"] == 16
    assert of_summary["cosine_mean"] > 0.9999
    info = cache_info.run(cache_info.CacheInfoConfig(path=paths[0]))
    assert info["summary"] == "class"
    assert info["fidelity"]["summary"]["tokens"] == 48


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_it_is_verified_and_repaired_like_the_tokens(make_cache: Make, store: str) -> None:
    path = make_cache(cache__store=store, cache__summary=True)
    assert verify(path, level="deep", samples=6).sound
    before = content(path)
    file = path / ("tokens/c.1.0.0.0" if store == "zarr" else "shards/000001-00.tar")
    damaged = bytearray(file.read_bytes())
    damaged[-2 if store == "zarr" else 5000] ^= 1
    file.write_bytes(damaged)
    assert not verify(path).sound
    assert verify(path, repair=True).sound
    assert content(path) == before


def test_a_teacher_without_a_class_token_says_so_before_a_cache_is_made(image_tree: Path, tmp_path: Path) -> None:
    pooled = {"spec": "timm:test_vit3", "weights": "random", "image_size": 64}
    with pytest.raises(TeacherError, match=r"teacher 'test_vit3' has no class token to keep: set cache.summary=false"):
        extract_teacher_features.run(extract_config(image_tree, tmp_path / "c", teacher=pooled, cache__summary=True))
    both = several(image_tree, tmp_path / "c", {"a": TEACHER, "b": pooled}, cache__summary=True)
    with pytest.raises(TeacherError, match="test_vit3"):
        extract_teacher_features.run(both)
    assert not (tmp_path / "c").exists()
    with pytest.raises(TeacherError, match="'aimv2_vitl14' has no class token to keep: set summary=false"):
        plan.run(plan.PlanConfig(teacher="aimv2_vitl14", summary=True))


def test_the_plan_counts_one_row_more() -> None:
    kept, plain = (plan.run(plan.PlanConfig(summary=summary, samples=1000)) for summary in (True, False))
    assert kept["bytes_per_view"] - plain["bytes_per_view"] == 768 + 2


def test_an_extraction_goes_on_with_its_own_summary_alone(make_cache: Make, image_tree: Path, tmp_path: Path) -> None:
    before = content(make_cache(cache__summary=True))
    facts = extract_teacher_features.run(extract_config(image_tree, tmp_path / "cache", cache__summary=True))
    assert facts["images"] == 0
    assert content(tmp_path / "cache") == before
    with pytest.raises(CacheError, match="summary is class there, absent here"):
        extract_teacher_features.run(extract_config(image_tree, tmp_path / "cache"))
