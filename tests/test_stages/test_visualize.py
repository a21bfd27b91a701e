"""visualize: every kind of checkpoint, image and teacher gives a picture of what is there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipeline.assembly.inspection import reconstruct
from pipeline.errors import CacheError, CheckpointError, ConfigError, DataError
from pipeline.models import Student, build_student, load_model, save_weights
from pipeline.training.checkpoint import resolve_checkpoint
from stages import finetune, pretrain, visualize
from stages.visualize import VisualizeConfig
from tests.test_stages.conftest import ENCODER, MICRO, TEACHER, finetune_config, pretrain_config


def config(init: Path, output: Path, **changes: Any) -> VisualizeConfig:
    return VisualizeConfig.model_validate({"init": str(init), "output": str(output), "count": 2, **changes})


def columns(facts: dict[str, Any]) -> str:
    return " | ".join(name.split(" (")[0] for name in facts["columns"])


WHOLE = (
    "input | masked input | reconstruction | teacher's attention | student's attention | teacher's features | "
    "student's features"
)


def test_from_the_cache_it_learned_from(student_run: Path, colours: Path, tmp_path: Path) -> None:
    data = {"path": str(colours / "train"), "workers": 0}
    cache = {"path": str(student_run.parent / "cache")}
    facts = visualize.run(config(student_run, tmp_path / "a.png", data=data, cache=cache))
    assert columns(facts) == WHOLE
    assert "drawn by attention" in facts["columns"][1]
    with Image.open(facts["picture"]) as picture:
        assert picture.width > 2 * picture.height  # seven columns, two rows
    with Image.open(facts["attention"]) as picture:
        assert Path(facts["attention"]) == tmp_path / "a_attention.png"
        assert picture.width > 3 * 512  # photo, teacher and student, each at full size
        assert picture.height > 2 * 512


def test_a_cross_decoder_completes_all_masked_patches(image_tree: Path, tmp_path: Path) -> None:
    data = {"path": str(image_tree), "workers": 0}
    keys = {"mimic": {"objective": "mae"}, "views": {"image_size": 64}, "student": {**MICRO, "decoder": "cross"}}
    pretrain.run(pretrain_config(tmp_path / "run", data=data, max_steps=1, **keys))
    student = load_model(resolve_checkpoint(tmp_path / "run"))
    assert isinstance(student, Student)
    images, ids_keep = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8), torch.tensor([[0, 5], [7, 9]])
    shown = reconstruct(student.eval(), images, ids_keep)
    grey = shown.masked[0, 0, 20, 40]  # in a masked patch
    assert (shown.masked[0, 0] == grey).float().mean() > 0.8
    assert (shown.completed[0, 0] == grey).float().mean() < 0.1
    assert torch.equal(shown.completed[0, :, :16, :16], shown.masked[0, :, :16, :16])  # a visible one
    facts = visualize.run(config(tmp_path / "run", tmp_path / "a.png", data=data))
    assert "reconstruction" in columns(facts)
    assert facts["pixel_loss"] > 0


def test_a_webdataset_cache_brings_its_images(cache: Path, image_tree: Path, tmp_path: Path) -> None:
    data = {"path": str(image_tree), "workers": 0}
    pretrain.run(pretrain_config(tmp_path / "run", data=data, cache={"path": str(cache)}, max_steps=1))
    keys = {} if cache.name == "webdataset" else {"data": data}
    facts = visualize.run(
        config(tmp_path / "run", tmp_path / "a.png", cache={"path": str(cache)}, samples=[3, 1], **keys)
    )
    assert columns(facts) == WHOLE


def test_image_files_and_a_live_teacher(student_run: Path, colours: Path, tmp_path: Path) -> None:
    files = [str(file) for file in sorted(colours.glob("val/*/*.png"))[:2]]
    facts = visualize.run(config(student_run, tmp_path / "a.png", images=files, teacher=TEACHER, focus="top-k"))
    assert columns(facts) == WHOLE
    alone = visualize.run(config(student_run, tmp_path / "b.png", images=files))
    assert columns(alone) == "input | masked input | reconstruction | student's attention | student's features"
    assert "drawn at random" in alone["columns"][1]


def test_a_cache_with_all_heads_shows_each(
    student_run: Path, image_tree: Path, make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    keys = {
        "data": {"path": str(image_tree), "workers": 0},
        "cache": {"path": str(make_cache(cache__attention="heads", cache__summary=True))},
    }
    facts = visualize.run(config(student_run, tmp_path / "a.png", **keys))
    assert columns(facts) == WHOLE.replace("student's attention", "student's attention | teacher's heads")


def test_every_caches_teacher_is_shown(
    student_run: Path, image_tree: Path, make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    """The first has no attention on the student's grid, so masks are drawn by the second's."""
    caches = {
        "small": {"path": str(make_cache("small", teacher={**TEACHER, "image_size": 32}))},
        "heads": {"path": str(make_cache("heads", cache__attention="heads", teacher__layer=2))},
    }
    facts = visualize.run(config(student_run, tmp_path / "a.png", data={"path": str(image_tree)}, caches=caches))
    assert columns(facts) == (
        "input | masked input | reconstruction | teacher small's attention | teacher heads's attention | "
        "student's attention | teacher heads's heads | teacher small's features | teacher heads's features | "
        "student's features"
    )
    assert "drawn by attention" in facts["columns"][1]
    with Image.open(facts["picture"]) as picture:
        assert picture.width > 3 * picture.height  # ten columns, two rows


def test_caches_of_other_views_are_refused(
    student_run: Path, image_tree: Path, make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    paths = {"a": make_cache("a"), "b": make_cache("b", views__seed=5)}
    caches = {name: {"path": str(path)} for name, path in paths.items()}
    with pytest.raises(CacheError, match="caches a and b differ in view_policy"):
        visualize.run(config(student_run, tmp_path / "a.png", data={"path": str(image_tree)}, caches=caches))


def test_networks_see_eight_pictures_at_a_time(
    student_run: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    for name in ("patch_features", "reconstruct"):
        real = getattr(visualize, name)

        def spy(model: Any, images: Any, *rest: Any, real: Any = real) -> Any:
            seen.append(len(images))
            return real(model, images, *rest)

        monkeypatch.setattr(visualize, name, spy)
    keys: dict[str, Any] = {"data": {"path": str(colours / "train")}, "teacher": TEACHER, "count": 11}
    facts = visualize.run(config(student_run, tmp_path / "a.png", **keys))
    assert seen == [8, 3] * 3  # teacher, student, reconstruction
    monkeypatch.setattr(visualize, "_CHUNK", 64)
    whole = visualize.run(config(student_run, tmp_path / "b.png", **keys))
    assert facts["pixel_loss"] == pytest.approx(whole["pixel_loss"], rel=1e-5)


def test_a_classifier_reconstructs_nothing(colours: Path, tmp_path: Path) -> None:
    finetune.run(finetune_config(colours, tmp_path / "run", student=ENCODER, max_steps=1))
    facts = visualize.run(
        VisualizeConfig.model_validate({"init": str(tmp_path / "run"), "data": {"path": str(colours / "val")}})
    )
    assert columns(facts) == "input | student's attention | student's features"
    assert "mean query" in facts["columns"][1]
    assert facts["picture"] == str(tmp_path / "run/visualize.png")  # a run folder keeps its own pictures


def test_a_student_without_a_class_token_is_asked_for_its_mean_query(colours: Path, tmp_path: Path) -> None:
    sizes = {"image_size": 64, "dim": 48, "depth": 1, "num_heads": 3}
    decoder = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
    (tmp_path / "start").mkdir()
    save_weights(build_student("mrmae_convvit_small_patch16", **sizes, **decoder, objective="mae"), tmp_path / "start")
    facts = visualize.run(config(tmp_path / "start", tmp_path / "a.png", data={"path": str(colours / "val")}))
    assert columns(facts) == "input | masked input | reconstruction | student's attention | student's features"
    assert facts["columns"][3] == "student's attention (mean query)"
    assert facts["pixel_loss"] > 0


def test_what_is_refused(student_run: Path, colours: Path, image_tree: Path, tmp_path: Path) -> None:
    data, cache = {"path": str(colours / "train")}, {"path": str(student_run.parent / "cache")}
    (tmp_path / "torn.jpg").write_bytes(b"no image")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"images": ["/absent.jpg"]}, DataError, "/absent.jpg: No such file"),
        ({"images": [str(tmp_path / "torn.jpg")]}, DataError, "torn.jpg: not a readable image"),
        ({"data": data, "samples": [99]}, ConfigError, "samples=99: there are samples 0 to 23"),
        ({"data": data, "focus": "sampled"}, ConfigError, "focus=sampled needs a teacher with attention"),
        (
            {"data": {"path": str(image_tree)}, "cache": cache},
            CacheError,
            r"cache test_vit was made of \d+ images at .*, not of these",
        ),
        ({"data": data, "init": "/absent"}, CheckpointError, "/absent does not exist"),
        (
            {"data": data, "init": str(max((student_run / "checkpoints").iterdir())), "output": None},
            ConfigError,
            "give output",
        ),
    ]
    for changes, kind, message in cases:
        with pytest.raises(kind, match=message):
            visualize.run(
                VisualizeConfig.model_validate({"init": str(student_run), "output": str(tmp_path / "x.png"), **changes})
            )
    for keys, message in (
        ({}, "give either images"),
        ({"images": ["a.jpg"], "data": data}, "give either images"),
        ({"cache": cache, "data": data, "teacher": TEACHER}, "brings its own teacher"),
        ({"data": data, "cache": cache, "caches": {"a": cache}}, "give one of cache"),
    ):
        with pytest.raises(ValueError, match=message):
            VisualizeConfig.model_validate({"init": "x", **keys})
