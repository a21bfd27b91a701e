"""Statistics of teachers, and teachers on another grid, from caches to losses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.assembly import knowledge
from pipeline.assembly.teachers import load_teacher
from pipeline.cache import read_header
from pipeline.configs.data import ViewConfig
from pipeline.configs.teachers import TeacherConfig
from pipeline.data.masks import MaskSampler
from pipeline.models import load_model
from pipeline.teachers import Teacher
from stages import extract_teacher_features, pretrain
from tests.test_stages.conftest import MICRO, TEACHER, extract_config, pretrain_config
from tests.test_stages.test_pretrain import Killed, Steps, inputs, losses, rows, weights

Make = Callable[..., Path]
RESIZED = {"resize_targets": "bilinear"}


def test_the_rotation_of_phi_s_is_measured_once_and_a_resumed_run_goes_on_bit_for_bit(
    make_cache: Make, image_tree: Path, tmp_path: Path
) -> None:
    paths = {"a": make_cache("a"), "b": make_cache("b", teacher__tokens="block", teacher__layers=2)}
    common: dict[str, Any] = {
        "data": {"path": str(image_tree), "workers": 0}, "caches": {name: {"path": paths[name]} for name in paths},
        "mimic": {"target_norm": "phi_s", "drop_teachers": "loss"}, "grad_norms_every": 0,
    }  # fmt: skip
    pretrain.run(pretrain_config(tmp_path / "whole", **common))
    with pytest.MonkeyPatch.context() as patch:
        Steps(patch, kill_at=3)
        with pytest.raises(Killed):
            pretrain.run(pretrain_config(tmp_path / "killed", checkpoint_every=2, **common))
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(knowledge, "mean_and_covariance")
        steps = Steps(patch)
        pretrain.run(pretrain_config(tmp_path / "killed", checkpoint_every=2, **common))
    assert steps.trained == [2, 3, 4, 5]
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert whole["mimic.a.rotation"].any()
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_phi_s_is_measured_on_this_runs_targets_whatever_it_starts_from(
    make_cache: Make, image_tree: Path, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"data": {"path": str(image_tree), "workers": 0}, "mimic": {"target_norm": "phi_s"}}
    first = {"t": {"path": make_cache("first")}}
    second = {"t": {"path": make_cache("second", teacher__tokens="block", teacher__layers=2)}}
    pretrain.run(pretrain_config(tmp_path / "first", caches=first, max_steps=1, **common))
    init = {"init": str(tmp_path / "first")}
    for name, start in (("second", {}), ("started", init)):
        pretrain.run(pretrain_config(tmp_path / name, caches=second, max_steps=1, **start, **common))
    rotation = {name: weights(tmp_path / name)["mimic.t.rotation"] for name in ("first", "second", "started")}
    assert torch.equal(rotation["started"], rotation["second"])
    assert not torch.allclose(rotation["started"], rotation["first"])
    student = load_model(tmp_path / "started/checkpoints/step-00000001")
    assert torch.equal(student.state_dict()["mimic.t.rotation"], rotation["started"])


def test_covariances_are_of_the_same_tokens_cached_and_live(make_cache: Make, image_tree: Path, tmp_path: Path) -> None:
    path = make_cache(views__count=1, cache__quantiser="float32")
    views = ViewConfig(count=1, image_size=64)
    teacher = load_teacher(TeacherConfig(**TEACHER), torch.device("cpu"), torch.float32)
    cached = knowledge.open_cached({"t": path}, str(image_tree), None).covariances(0)["t"]
    live = knowledge.open_live({"t": teacher}, str(image_tree), None, views).covariances(0)["t"]
    for value, of_live in zip(cached, live, strict=True):
        torch.testing.assert_close(value, of_live, rtol=1e-4, atol=1e-6)
    assert knowledge.open_live({}, str(image_tree), None, views).covariances(0) == {}


def test_a_small_caches_covariance_is_of_all_its_views(make_cache: Make, image_tree: Path) -> None:
    """24 images are less than the 256 that a covariance is measured on."""
    cached = knowledge.open_cached({"t": make_cache()}, str(image_tree), None)
    records = [cached.caches["t"].read(index, view, dequantise=True) for index in range(24) for view in range(2)]
    tokens = torch.cat([torch.from_numpy(record.tokens) for record in records]).double()
    mean, covariance = cached.covariances(0)["t"]
    torch.testing.assert_close(mean, tokens.mean(0))
    torch.testing.assert_close(covariance, tokens.T.cov(correction=0))


@pytest.mark.parametrize("patch_size", [8, 32])  # 8×8 and 2×2 cells; the teacher has 4×4
@pytest.mark.parametrize(
    ("focus", "masks", "objective"),
    [("sampled", 2, "mr_mae"), ("top-k", 1, "mr_mae"), ("random", 2, "joint_decoder"), ("sampled", 1, "mae")],
)
def test_cached_equals_online_on_another_grid(
    make_cache: Make, image_tree: Path, tmp_path: Path, patch_size: int, focus: str, masks: int, objective: str
) -> None:
    common: dict[str, Any] = {
        "data": {"path": str(image_tree), "workers": 0}, "mask": {"focus": focus, "masks_per_sample": masks},
        "mimic": {**RESIZED, "objective": objective}, "student": {**MICRO, "patch_size": patch_size},
    }  # fmt: skip
    path = make_cache(cache__quantiser="float32")
    views = {"count": 2, "image_size": 64}
    pretrain.run(pretrain_config(tmp_path / "cached", cache={"path": str(path)}, **common))
    pretrain.run(pretrain_config(tmp_path / "online", teacher=TEACHER, views=views, **common))
    assert dict(losses(tmp_path / "online")) == pytest.approx(dict(losses(tmp_path / "cached")), rel=1e-5)


def test_only_the_teacher_on_another_grid_is_resized(make_cache: Make, image_tree: Path, tmp_path: Path) -> None:
    """The second teacher sees the view at half its size, so its grid is 2×2."""
    small = {**TEACHER, "image_size": 32}
    common: dict[str, Any] = {"data": {"path": str(image_tree), "workers": 0}, "mimic": RESIZED}
    paths = {"a": make_cache("a", cache__quantiser="float32")}
    paths["b"] = make_cache("b", cache__quantiser="float32", teacher=small)
    caches = {name: {"path": str(path)} for name, path in paths.items()}
    with_workers = {**common, "data": {"path": str(image_tree), "workers": 2}}
    pretrain.run(pretrain_config(tmp_path / "cached", caches=caches, **with_workers))
    views = {"count": 2, "image_size": 64}
    pretrain.run(pretrain_config(tmp_path / "online", teachers={"a": TEACHER, "b": small}, views=views, **common))
    assert dict(losses(tmp_path / "online")) == pytest.approx(dict(losses(tmp_path / "cached")), rel=1e-5)
    dataset = knowledge.open_cached(paths, str(image_tree), None).dataset(
        MaskSampler(16, 4, "sampled", seed=0, count=2), "visible", (4, 4)
    )
    stored = dataset.__getitems__([(0, 0), (0, 1), (0, 2)]).targets
    assert stored["a"][0].shape == (6, 4, 64)  # the visible rows of each mask
    assert stored["b"][0].shape == (3, 4, 64)  # all 2×2 tokens of each sample


def test_layers_of_one_teacher_are_targets_of_one_run(
    make_cache: Make, image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One forward for three caches, each as if extracted alone, and for three live targets; a loss for each."""
    teachers = {f"l{layer}": {**TEACHER, "layer": layer} for layer in (2, 4, 6)}
    traces: list[int] = []
    trace = Teacher.trace

    def count(self: Teacher, views: torch.Tensor, depth: int | None = None) -> Any:
        if self.device.type != "meta":  # a rehearsal computes nothing
            traces.append(len(views))
        return trace(self, views, depth)

    monkeypatch.setattr(Teacher, "trace", count)
    extract_teacher_features.run(extract_config(image_tree, tmp_path / "all", teacher=None, teachers=teachers))
    assert sum(traces) == 24 + 48  # images for calibration, then two views of each
    paths = {name: tmp_path / "all" / name for name in teachers}
    for name, path in paths.items():
        alone = make_cache(name, teacher=teachers[name])
        chunks = sorted(path.glob("tokens/c.*"))
        assert len(chunks) == 6
        assert all(chunk.read_bytes() == (alone / "tokens" / chunk.name).read_bytes() for chunk in chunks)
    assert read_header(paths["l4"]).teacher["layer"] == 4
    assert "layer" not in read_header(paths["l6"]).teacher  # the last one, as in caches of before

    data = {"path": str(image_tree), "workers": 0}
    caches = {name: {"path": str(path)} for name, path in paths.items()}
    pretrain.run(pretrain_config(tmp_path / "cached", data=data, caches=caches))
    del traces[:]
    live: dict[str, Any] = {"teachers": teachers, "views": {"count": 2, "image_size": 64}, "grad_norms_every": 0}
    pretrain.run(pretrain_config(tmp_path / "online", data=data, **live))
    assert traces == [8] * 6  # a forward a step
    assert {f"mimic_loss/{name}" for name in teachers} <= rows(tmp_path / "cached")[-1].keys()
    assert dict(losses(tmp_path / "online")) == pytest.approx(dict(losses(tmp_path / "cached")), rel=1e-2)


def test_resizing_between_equal_grids_changes_nothing(make_cache: Make, image_tree: Path, tmp_path: Path) -> None:
    common = inputs(make_cache(), image_tree)
    pretrain.run(pretrain_config(tmp_path / "plain", **common))
    pretrain.run(pretrain_config(tmp_path / "resized", mimic=RESIZED, **common))
    assert losses(tmp_path / "resized") == losses(tmp_path / "plain")
