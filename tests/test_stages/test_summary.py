"""The teacher's class token, from extraction through the cache to the student's loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from pipeline.assembly import knowledge
from pipeline.assembly.teachers import load_teacher
from pipeline.cache import open_cache, read_commit, read_header
from pipeline.configs.teachers import TeacherConfig
from pipeline.data.decoding import decode
from pipeline.data.images import open_images
from pipeline.data.views import View, render, to_chw
from pipeline.errors import CacheError, TeacherError
from pipeline.models import load_model
from stages import cache_info, extract_teacher_features, plan, pretrain, verify_cache
from tests.test_stages.conftest import MICRO, TEACHER, extract_config, pretrain_config
from tests.test_stages.test_extract_teacher_features import content, several
from tests.test_stages.test_pretrain import killed_and_resumed, losses, rows, weights

Make = Callable[..., Path]
SUMMARY = {"summary_weight": 1.0}
VIEWS = {"count": 2, "image_size": 64}
BLOCK = {**TEACHER, "tokens": "block"}
CONVVIT = {
    "name": "mrmae_convvit_small_patch16", "image_size": 64, "dim": 48, "depth": 2, "num_heads": 3,
    "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip


def all_losses(output: Path) -> list[dict[str, float]]:
    """Each row without what isn't a loss."""
    named = ("loss", "pixel_loss", "mimic_loss", "summary_loss")
    return [{key: value for key, value in row.items() if key.startswith(named)} for row in rows(output)]


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


@pytest.mark.parametrize(("student", "masks", "quantiser"), [(MICRO, 2, "float32"), (CONVVIT, 1, "int8")])
def test_cached_equals_live_with_one_teacher_and_with_two(
    make_cache: Make, image_tree: Path, tmp_path: Path, student: dict[str, Any], masks: int, quantiser: str
) -> None:
    """Two workers hand the cached class tokens over; two masks of an image share one."""
    teachers = {"a": TEACHER, "b": BLOCK}
    common: dict[str, Any] = {"student": student, "mimic": SUMMARY, "mask": {"masks_per_sample": masks}}
    live, cached = ({"data": {"path": str(image_tree), "workers": workers}} for workers in (0, 2))
    for names in (["a"], ["a", "b"]):
        caches = {
            name: {"path": make_cache(f"{name}{len(names)}", teacher=teachers[name], cache__summary=True,
                                      cache__quantiser=quantiser, views__count=2)}
            for name in names
        }  # fmt: skip
        runs = {
            "live": {"teachers": {name: teachers[name] for name in names}, "views": VIEWS, **live},
            "cached": {"caches": caches, **cached},
        }
        for way, keys in runs.items():
            pretrain.run(pretrain_config(tmp_path / f"{way}{len(names)}", max_steps=3, **common, **keys))
        found, expected = (all_losses(tmp_path / f"{way}{len(names)}") for way in ("cached", "live"))
        parts = {f"summary_loss/{name}" for name in names} if len(names) > 1 else set()
        assert {"summary_loss"} | parts == {key for key in found[0] if "summary" in key}
        for row, live_row in zip(found, expected, strict=True):
            assert row == pytest.approx(live_row, rel=1e-5 if quantiser == "float32" else 1e-2)


def test_the_summary_loss_falls(make_cache: Make, image_tree: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"cache": {"path": make_cache(cache__summary=True)}, "mimic": SUMMARY}
    data = {"path": str(image_tree), "workers": 0}
    pretrain.run(pretrain_config(tmp_path / "run", max_steps=40, epochs=40, grad_norms_every=20, data=data, **keys))
    written = rows(tmp_path / "run")
    assert written[-1]["summary_loss"] < 0.5 * written[0]["summary_loss"]
    assert written[0]["grad_norm/summary_loss"] > 0
    assert load_model(tmp_path / "run/checkpoints/step-00000040").state_dict()["summary.test_vit.head.bias"].any()


def test_dispersions_are_measured_once_and_a_resumed_run_goes_on_bit_for_bit(
    make_cache: Make, image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {"a": make_cache("a", cache__summary=True), "b": make_cache("b", teacher=BLOCK, cache__summary=True)}
    common: dict[str, Any] = {
        "data": {"path": str(image_tree), "workers": 0}, "caches": {name: {"path": paths[name]} for name in paths},
        "mimic": SUMMARY, "grad_norms_every": 0, "checkpoint_every": 2,
    }  # fmt: skip
    measured: list[str] = []
    measure = knowledge.angular_dispersion
    monkeypatch.setattr(knowledge, "angular_dispersion", lambda of: measured.append("once") or measure(of))
    pretrain.run(pretrain_config(tmp_path / "whole", **common))
    assert len(measured) == 2
    resumed = killed_and_resumed(tmp_path / "killed", 3, **common)
    assert resumed.trained == [2, 3, 4, 5]
    assert len(measured) == 4  # not again when it went on
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    reader = open_cache(paths["b"])
    found = [reader.read(index, 0, dequantise=True).summary for index in range(24)]
    units = np.concatenate(found) / np.linalg.norm(np.concatenate(found), axis=1, keepdims=True)
    assert whole["summary.b.dispersion"].item() == pytest.approx(1 - np.linalg.norm(units.mean(0)), rel=1e-5)


def test_dispersions_are_the_same_cached_and_live(make_cache: Make, image_tree: Path) -> None:
    path = make_cache(cache__summary=True, cache__quantiser="float32", views__count=1)
    teacher = load_teacher(TeacherConfig.model_validate(TEACHER), torch.device("cpu"))
    views = knowledge.ViewConfig(count=1, image_size=64)
    cached = knowledge.open_cached({"t": path}, str(image_tree), None).dispersions(0)["t"]
    live = knowledge.open_live({"t": teacher}, str(image_tree), None, views).dispersions(0)["t"]
    torch.testing.assert_close(cached, live, rtol=1e-4, atol=1e-7)


def test_a_loss_on_class_tokens_that_are_not_there_is_refused(
    make_cache: Make, image_tree: Path, tmp_path: Path
) -> None:
    data = {"path": str(image_tree), "workers": 0}
    cache = {"cache": {"path": make_cache("plain")}}
    pooled = {"teacher": {"spec": "timm:test_vit3", "weights": "random", "image_size": 64}, "views": VIEWS}
    for keys, error, message in (
        (
            cache,
            CacheError,
            r"cache test_vit holds no class token, .* into a new folder with cache.summary=true",
        ),
        (pooled, TeacherError, r"teacher test_vit3 has no class token, which mimic.summary_weight=1.0 needs: choose"),
    ):
        with pytest.raises(error, match=message) as refused:
            pretrain.run(pretrain_config(tmp_path / "run", data=data, mimic=SUMMARY, **keys))
        assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_summary_that_no_loss_wants_changes_nothing(make_cache: Make, image_tree: Path, tmp_path: Path) -> None:
    data = {"path": str(image_tree), "workers": 0}
    for name, summary in (("with", True), ("without", False)):
        cache = {"path": make_cache(name, cache__summary=summary)}
        pretrain.run(pretrain_config(tmp_path / f"run-{name}", cache=cache, data=data, max_steps=2))
    assert losses(tmp_path / "run-with") == losses(tmp_path / "run-without")
