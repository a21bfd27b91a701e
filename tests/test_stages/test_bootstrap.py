"""Stages of pre-training: each student teaches the next one, and what is done is not done again."""

import csv
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pipeline.cache import open_cache
from pipeline.config import load_config
from pipeline.errors import ConfigError
from stages import bootstrap
from stages.configs.bootstrap import BootstrapConfig
from tests.test_stages.test_ablate import write_config

pytestmark = pytest.mark.usefixtures("forked_commands")


def write_stages(folder: Path, images: Path, **changes: object) -> Path:
    keys = {"output": str(folder / "stages"), "pretrain": ["mimic.mimic_weight=3"], **changes}
    file = write_config(folder, images)
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(file), {"bootstrap": keys}), file)
    return file


def run(file: Path, said: list[str]) -> str:
    return bootstrap.run(load_config(BootstrapConfig, file, section="bootstrap"), file, said.append)


def config_of(student: Path) -> "OmegaConf":
    return OmegaConf.load(student / "config.yaml")


def test_each_student_teaches_the_next(image_tree: Path, tmp_path: Path) -> None:
    file, said = write_stages(tmp_path, image_tree, seeds=[0, 1]), list[str]()
    table = run(file, said)
    later = ["stage 2: extract-teacher-features", "stage 2: pretrain", "stage 2: knn"]
    assert said == ["stage 1: extract-teacher-features"] + [
        f"seed {seed}, {line}" for seed in (0, 1) for line in ["stage 1: pretrain", "stage 1: knn", *later]
    ]
    out = tmp_path / "stages"
    for seed in (0, 1):
        first, second = (out / f"seed{seed}/stage{stage}" for stage in (1, 2))
        teacher = open_cache(second / "cache").header.teacher
        assert teacher["spec"] == f"mrmae:{first / 'student'}"
        assert config_of(first / "student").cache.path == str(out / "first_teacher/cache")
        assert config_of(second / "student").cache.path == str(second / "cache")
        assert (config_of(second / "student").seed, config_of(second / "student").init) == (seed, None)
        assert config_of(second / "student").mimic.mimic_weight == 3
    rows = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    assert [(row["seed"], row["stage"]) for row in rows] == [("0", "1"), ("0", "2"), ("1", "1"), ("1", "2")]
    record = json.loads((out / "seed1/stage2/metrics.json").read_text())["knn"]["top1"]
    assert float(rows[3]["knn"]) == record
    assert f"| 2 | {(float(rows[1]['knn']) + record) / 2:.3f} ±" in table
    assert (out / "curve.png").read_bytes()[:4] == b"\x89PNG"
    said.clear()
    assert run(file, said) == table
    assert said == []


def test_a_third_stage_goes_on_from_the_second(image_tree: Path, tmp_path: Path) -> None:
    said = list[str]()
    run(write_stages(tmp_path, image_tree, start="pixels", stages=1), said)
    assert said == ["seed 0, stage 1: pretrain", "seed 0, stage 1: knn"]
    assert config_of(tmp_path / "stages/seed0/stage1/student").mimic.objective == "mae"
    said.clear()
    run(write_stages(tmp_path, image_tree, start="pixels", stages=3, init="previous"), said)
    assert [line.removeprefix("seed 0, ") for line in said] == [
        f"stage {stage}: {step}" for stage in (2, 3) for step in ("extract-teacher-features", "pretrain", "knn")
    ]
    before = tmp_path / "stages/seed0/stage2/student"
    assert config_of(tmp_path / "stages/seed0/stage3/student").init == str(before)


def test_the_first_teacher_keeps_a_share(image_tree: Path, tmp_path: Path) -> None:
    run(write_stages(tmp_path, image_tree, first_teacher=0.25), [])
    student = config_of(tmp_path / "stages/seed0/stage2/student")
    assert {name: cache.path for name, cache in student.caches.items()} == {
        "previous": str(tmp_path / "stages/seed0/stage2/cache"), "first": str(tmp_path / "stages/first_teacher/cache"),
    }  # fmt: skip
    assert student.mimic.teacher_weights == {"previous": 0.75, "first": 0.25}


def test_what_the_section_says_of_the_first_teacher_is_not_said_of_a_student(image_tree: Path, tmp_path: Path) -> None:
    file = write_stages(tmp_path, image_tree)
    config = OmegaConf.load(file)
    config["extract-teacher-features"].teacher.update({"tokens": "block", "layer": 3, "layers": 2})
    OmegaConf.save(config, file)
    run(file, [])
    first, second = (open_cache(tmp_path / "stages" / cache) for cache in ("first_teacher/cache", "seed0/stage2/cache"))
    assert (first.header.teacher["tokens"], first.header.teacher["layer"]) == ("block", 3)
    assert second.header.teacher["tokens"] == "norm"
    assert second.header.teacher.get("layer") is None


@pytest.mark.parametrize("start", ["teacher", "pixels"])
def test_several_teachers_are_refused_before_hours_of_work(image_tree: Path, tmp_path: Path, start: str) -> None:
    file = write_stages(tmp_path, image_tree, start=start)
    config = OmegaConf.load(file)
    section = config["extract-teacher-features"]
    section.teachers = {"first": section.pop("teacher")}
    OmegaConf.save(config, file)
    with pytest.raises(ConfigError, match=r"'extract-teacher-features': stages have one teacher; give teacher.spec"):
        run(file, said := list[str]())
    assert said == []


def test_pixels_have_no_teacher_that_could_stay(image_tree: Path, tmp_path: Path) -> None:
    file = write_stages(tmp_path, image_tree, start="pixels", first_teacher=0.5)
    with pytest.raises(ConfigError, match="first_teacher needs start=teacher"):
        load_config(BootstrapConfig, file, section="bootstrap")
