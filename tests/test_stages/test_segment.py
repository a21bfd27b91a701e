"""segment: training and scoring through the stage, scikit-learn's score of the same predictions, resume, refusals."""

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score

import cli
from pipeline.assembly.subjects import Subject
from pipeline.detection import open_coco, semantic_labels
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.evaluation.records import read_records
from pipeline.models import build_student, save_weights
from pipeline.segmentation import SegmentationHead
from stages import report, segment
from stages.segment import SegmentConfig
from tests.coco import write_coco
from tests.pages import ParsedPage
from tests.test_stages.conftest import TEACHER
from tests.test_stages.test_processes import forked_ranks

pytestmark = pytest.mark.usefixtures("one_thread")  # micro models are slower on several threads

STUDENT = {
    "name": "mrmae_vit_tiny_patch16", "image_size": 64, "patch_size": 8, "dim": 48, "depth": 1, "num_heads": 3,
    "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Coloured rectangles: the same scenes with COCO's masks, and with palette PNGs in folders of two levels."""
    root = tmp_path_factory.mktemp("scenes")
    images, annotations = write_coco(root)
    coco = open_coco(images, annotations)
    for index in range(len(coco)):
        name = Path(coco.key(index))
        for folder in ("photos", "labels"):
            (root / folder / "a").mkdir(parents=True, exist_ok=True)
        shutil.copy(images / name, root / "photos/a" / name)
        picture = Image.fromarray(semantic_labels(coco, index, ignored=255).astype(np.uint8))
        picture.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tolist())
        picture.save(root / "labels/a" / name)
    return {
        "coco": {"images": str(images), "labels": str(annotations)},
        "png": {"images": str(root / "photos"), "labels": str(root / "labels")},
    }


def segment_config(scenes: dict[str, Any], output: Path, **changes: Any) -> SegmentConfig:
    keys: dict[str, Any] = {
        "data": {"train": scenes, "val": scenes, "workers": 0},
        "output": str(output),
        "student": STUDENT,
        "optim": {"lr": 0.03, "warmup_epochs": 0},
        "batch_size": 4,
        "max_steps": 5,
        "eval_every": 1000,
        "log_every": 1,
        "tensorboard": False,
    }
    return SegmentConfig.model_validate({**keys, **changes})


@pytest.fixture(scope="module")
def trained(folders: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[SegmentConfig, dict[str, Any]]:
    """A run that has learned colours, and what its training said."""
    config = segment_config(folders["coco"], tmp_path_factory.mktemp("trained") / "out", max_steps=None, pictures=3)
    return config, segment.run(config)


def test_the_score_is_scikit_learns_of_the_same_predictions(
    trained: tuple[SegmentConfig, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, facts = trained
    labels: list[np.ndarray] = []
    predictions: list[np.ndarray] = []
    predict = segment._predict

    def spy(subject: Subject, head: SegmentationHead, batch: Any) -> list[torch.Tensor]:
        found = predict(subject, head, batch)
        labels.extend(label.numpy() for label in batch.labels)
        predictions.extend(label.numpy() for label in found)
        return found

    monkeypatch.setattr(segment, "_predict", spy)
    scored = segment.run(config.model_copy(update={"pictures": 0}), eval_only=True)
    truth, found = (np.concatenate([part.ravel() for part in parts]) for parts in (labels, predictions))
    assert truth.shape == found.shape == (4 * 64 * 96,)
    assert scored["mIoU"] == pytest.approx(jaccard_score(truth, found, average="macro"), abs=1e-12)
    assert scored["pixel_accuracy"] == pytest.approx(accuracy_score(truth, found), abs=1e-12)
    classes = read_records(config.output / "metrics.json")["segment"]["classes"]
    names = ["background", "green", "blue", "red"]
    matrix = confusion_matrix(truth, found, labels=range(4))
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    assert classes == {
        name: {"pixels": matrix[row].sum(), "IoU": pytest.approx(matrix[row, row] / union[row])}
        for row, name in enumerate(names)
    }
    assert facts["mIoU"] == pytest.approx(scored["mIoU"])
    assert scored["mIoU"] > 0.4  # colour is in untrained features too


def test_pictures_and_the_report(trained: tuple[SegmentConfig, dict[str, Any]]) -> None:
    config, _ = trained
    segment.run(config, eval_only=True)
    assert np.asarray(Image.open(config.output / "predictions.png")).std() > 10
    page = ParsedPage(Path(report.run(report.ReportConfig(paths=[config.output]))["page"]))
    table = page.tables["Segmentation"]
    assert {"validation, last", "segment"} <= set(table.groups)
    assert table.column("images")[-1] == "4"
    classes = page.tables[f"{config.output.name}, segment: classes"]
    assert sorted(classes.column("classes")) == ["background", "blue", "green", "red"]
    assert all(cell.endswith(" %") for cell in classes.column("IoU"))
    assert "Classification" not in page.tables


def test_label_files_teach_what_cocos_masks_teach(folders: dict[str, Any], tmp_path: Path) -> None:
    """Palette indices are numbers; with reduce_zero_label and every number one higher they are the same again."""
    facts = segment.run(segment_config(folders["coco"], tmp_path / "coco"))
    names = tmp_path / "names.txt"
    names.write_text("background\ngreen\nblue\nred\n")
    labels = {"num_classes": 4, "class_names": str(names)}
    scored = segment.run(segment_config(folders["png"], tmp_path / "coco", labels=labels), eval_only=True)
    assert scored["mIoU"] == pytest.approx(facts["mIoU"], abs=1e-12)
    shifted = tmp_path / "shifted/a"
    shifted.mkdir(parents=True)
    for file in Path(folders["png"]["labels"], "a").iterdir():
        numbers = np.asarray(Image.open(file)).astype(np.uint16) + 1
        Image.fromarray(numbers).save(shifted / file.name)  # 16 bits
    scenes = {**folders["png"], "labels": str(tmp_path / "shifted")}
    again = segment_config(scenes, tmp_path / "coco", labels={**labels, "reduce_zero_label": True})
    assert segment.run(again, eval_only=True)["mIoU"] == scored["mIoU"]


def test_a_stopped_run_goes_on_bit_for_bit(folders: dict[str, Any], tmp_path: Path) -> None:
    keys: dict[str, Any] = {"labels": {"num_classes": 4}, "checkpoint_every": 3, "keep_checkpoints": 3}
    segment.run(segment_config(folders["png"], tmp_path / "whole", **keys))
    segment.run(segment_config(folders["png"], tmp_path / "parts", **keys))
    shutil.rmtree(tmp_path / "parts/checkpoints/step-00000005")
    facts = segment.run(segment_config(folders["png"], tmp_path / "parts", **keys))
    newest = [tmp_path / name / "checkpoints/step-00000005/model.safetensors" for name in ("whole", "parts")]
    assert newest[0].read_bytes() == newest[1].read_bytes()
    assert set(load_file(newest[0])) == {
        "head.weight", "head.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
        "norm.num_batches_tracked",
    }  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5]
    assert {"mIoU", "pixel_accuracy"} <= set(facts)
    known = segment_config(folders["png"], tmp_path / "parts")  # what the numbers mean, the checkpoint says
    assert segment.run(known, eval_only=True)["mIoU"] == pytest.approx(facts["mIoU"], abs=1e-12)
    with pytest.raises(CheckpointError, match="holds a run with crops="):
        segment.run(segment_config(folders["png"], tmp_path / "parts", **keys, hflip=0.0))


def test_two_processes_train_and_score(folders: dict[str, Any], tmp_path: Path) -> None:
    config = segment_config(folders["coco"], tmp_path / "out", max_steps=2)
    words = [
        f"{key}={json.dumps(value)}" if isinstance(value, dict) else f"{key}={value}"
        for key, value in config.model_dump(mode="json", exclude_defaults=True).items()
    ]
    done = forked_ranks(2, "segment", *words)
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    scored = segment.run(config, eval_only=True)
    assert rows[-1]["mIoU"] == pytest.approx(scored["mIoU"], abs=1e-12)


def test_a_teacher_is_a_subject_and_no_other_may_take_its_place(folders: dict[str, Any], tmp_path: Path) -> None:
    keys = {"student": None, "teacher": TEACHER, "max_steps": 1}
    facts = segment.run(segment_config(folders["coco"], tmp_path / "out", **keys))
    assert (
        segment.run(segment_config(folders["coco"], tmp_path / "out", **keys), eval_only=True)["mIoU"] == facts["mIoU"]
    )
    with pytest.raises(CheckpointError, match="was trained on other features: give the init"):
        segment.run(segment_config(folders["coco"], tmp_path / "out"), eval_only=True)
    with pytest.raises(DataError, match="other classes than the head"):
        segment.run(segment_config(folders["png"], tmp_path / "out", **keys, labels={"num_classes": 5}), eval_only=True)
    with pytest.raises(ConfigError, match=r"data\.val\.labels=.* is a folder: give labels\.num_classes"):
        segment.run(segment_config(folders["png"], tmp_path / "out", **keys), eval_only=True)
    with pytest.raises(ConfigError, match=r"'data\.train' is missing"):
        segment.run(segment_config(folders["coco"], tmp_path / "out", data={"val": folders["coco"]}, **keys))


@pytest.mark.parametrize("subject", ["teacher", "untrained student", "init"])
def test_the_next_command_can_be_typed(
    folders: dict[str, Any], tmp_path: Path, subject: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {"max_steps": 1, "labels": {"num_classes": 4, "ignore_index": 200}, "seed": 3}
    if subject == "teacher":
        keys |= {"student": None, "teacher": {**TEACHER, "layer": 2}}
    elif subject == "init":
        torch.manual_seed(0)
        (tmp_path / "student").mkdir()
        save_weights(build_student(**STUDENT, objective="mae"), tmp_path / "student")
        keys |= {"init": str(tmp_path / "student"), "student": {"image_size": 32}}
    tasks: list[Any] = []
    fit = segment.fit
    monkeypatch.setattr(segment, "fit", lambda task, *others: (tasks.append(task), fit(task, *others))[1])
    facts = segment.run(segment_config(folders["png"], tmp_path / "out", **keys))
    (line,) = tasks[0].next_commands
    result = CliRunner().invoke(cli.main, shlex.split(line)[1:])
    assert result.exit_code == 0, result.output
    assert read_records(tmp_path / "out/metrics.json")["segment"]["mIoU"] == pytest.approx(facts["mIoU"], abs=1e-12)
    assert (tmp_path / "out/predictions.png").exists()


@pytest.mark.parametrize(("precision", "reduced"), [("bf16", True), ("fp32", False), ("auto", False)])
def test_evaluation_computes_in_the_precision_of_the_key(
    trained: tuple[SegmentConfig, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, precision: str, reduced: bool
) -> None:
    config, _ = trained
    used = set()
    predict = segment._predict

    def spy(*arguments: Any) -> list[torch.Tensor]:
        used.add(torch.is_autocast_enabled("cpu"))
        return predict(*arguments)

    monkeypatch.setattr(segment, "_predict", spy)
    segment.run(config.model_copy(update={"precision": precision, "pictures": 0}), eval_only=True)
    assert used == {reduced}


def test_other_labels_under_the_same_names_are_another_run(folders: dict[str, Any], tmp_path: Path) -> None:
    labels = Path(shutil.copytree(folders["png"]["labels"], tmp_path / "labels"))
    scenes = {**folders["png"], "labels": str(labels)}
    keys: dict[str, Any] = {"labels": {"num_classes": 4}, "max_steps": 1}
    segment.run(segment_config(scenes, tmp_path / "out", **keys))
    segment.run(segment_config(scenes, tmp_path / "out", **keys))  # goes on: it is the same
    file = labels / "a/0.png"
    numbers = np.asarray(Image.open(file)).copy()
    numbers[0, 0] ^= 1
    Image.fromarray(numbers).save(file)
    with pytest.raises(CheckpointError, match="holds a run with label_files="):
        segment.run(segment_config(scenes, tmp_path / "out", **keys))


def _resize(file: Path) -> None:
    Image.open(file).resize((95, 64)).save(file)


def _colour(file: Path) -> None:
    Image.open(file).convert("RGB").save(file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_resize, r"image a/0\.png has 96 × 64 pixels, its labels 95 × 64: labels must have the size of the image"),
        (_colour, r"label file .*labels/a/0\.png: its pixels are RGB, not one number each"),
        (Path.unlink, r"1 of 4 images have no label file, such as .*labels/a/0\.png"),
        (lambda file: os.truncate(file, 60), r"label file .*labels/a/0\.png: not a readable image"),
        (
            lambda file: Image.new("L", (96, 64), 7).save(file),
            r"labels/a/0\.png holds the number 7: classes are 0 to 3, and 255 is no class",
        ),
    ],
    ids=["another size", "colours", "absent", "torn", "no class"],
)
def test_a_label_file_that_does_not_fit_is_named(
    folders: dict[str, Any], tmp_path: Path, spoil: Any, message: str
) -> None:
    labels = tmp_path / "labels"
    shutil.copytree(folders["png"]["labels"], labels)
    scenes = {**folders["png"], "labels": str(labels)}
    config = segment_config(scenes, tmp_path / "out", labels={"num_classes": 4}, max_steps=1, student=STUDENT)
    spoil(labels / "a/0.png")
    with pytest.raises(DataError, match=message) as caught:
        segment.run(config)
    assert "\n" not in str(caught.value)
