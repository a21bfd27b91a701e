"""predict, and what a classifier's classes are called: in its checkpoint, in its export, in evaluations and reports."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from sklearn.metrics import confusion_matrix, recall_score

import cli
from pipeline.configs.data import DataConfig
from pipeline.data.class_names import read_class_names
from pipeline.data.labelled import LabelledDataset, open_labelled
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.evaluation.metrics import class_accuracies
from pipeline.evaluation.pictures import draw_confusion
from pipeline.evaluation.records import read_records
from pipeline.models import load_model
from pipeline.pixels import normalise
from pipeline.training.checkpoint import load_checkpoint, resolve_checkpoint
from stages import export, finetune, predict, report
from stages.finetune import EvaluateConfig
from stages.predict import PredictConfig
from tests.pages import ParsedPage
from tests.test_pipeline.data.test_readable import write_tar
from tests.test_stages.conftest import ENCODER, finetune_config
from tests.test_stages.test_embed import damaged
from tests.test_stages.test_finetune import CONV


@pytest.fixture(scope="module")
def classifier(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is right about some photos."""
    output = tmp_path_factory.mktemp("classifier") / "run"
    finetune.run(finetune_config(colours, output, student=ENCODER, max_steps=4))
    return output


def rows(output: Path, **keys: Any) -> list[dict[str, str]]:
    predict.run(PredictConfig.model_validate({**keys, "output": str(output)}))
    return list(csv.DictReader(io.StringIO(output.read_text())))


def photos(colours: Path) -> dict[str, Any]:
    return {"data": {"path": str(colours / "val"), "workers": 0}}


def probabilities(colours: Path, classifier: Path) -> torch.Tensor:
    val = open_labelled("val.path", DataConfig(path=str(colours / "val")))
    images = LabelledDataset(val, 64).__getitems__([(0, index) for index in range(len(val))]).images
    with torch.inference_mode():
        return load_model(resolve_checkpoint(classifier)).eval()(normalise(images)).softmax(-1)


def test_rows_are_the_models_probabilities_under_the_classes_names(
    colours: Path, classifier: Path, tmp_path: Path
) -> None:
    expected = probabilities(colours, classifier)
    names = np.array(["blue", "green", "red"])
    found = rows(tmp_path / "a.csv", init=str(classifier), **photos(colours), eval_batch_size=5)
    assert list(found[0]) == ["key", *(f"{w}_{n}" for n in (1, 2, 3) for w in ("class", "probability")), "error"]
    order = expected.argsort(dim=1, descending=True)
    assert [[row[f"class_{n}"] for n in (1, 2, 3)] for row in found] == names[order].tolist()
    written = np.array([[float(row[f"probability_{n}"]) for n in (1, 2, 3)] for row in found])
    np.testing.assert_allclose(written, expected.gather(1, order), atol=1e-5)
    assert {row["error"] for row in found} == {""}

    config = {"init": str(classifier), **photos(colours), "top": 1, "output": str(tmp_path / "a.jsonl")}
    assert predict.run(PredictConfig.model_validate(config)) == f"12 images, 0 of them unreadable: {tmp_path}/a.jsonl"
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [row["key"] for row in found]
    assert [line["classes"][0]["class"] for line in lines] == [row["class_1"] for row in found]
    assert all(len(line["classes"]) == 1 for line in lines)


def test_an_unreadable_photo_has_a_row_that_says_why(colours: Path, classifier: Path, tmp_path: Path) -> None:
    keys = {"init": str(classifier), **damaged(colours, tmp_path / "photos")}
    whole = rows(tmp_path / "a.csv", init=str(classifier), **photos(colours))
    found = rows(tmp_path / "b.csv", **keys)
    faults = {row["key"]: row["error"] for row in found if row["error"]}
    assert faults["red/gone.png"] == "No such file or directory"
    assert set(faults) == {whole[0]["key"], whole[5]["key"], "red/gone.png"}
    assert [row for row in found if not row["error"]] == [row for row in whole if row["key"] not in faults]
    assert {row["class_1"] for row in found if row["error"]} == {""}
    rows_as_json = {**keys, "output": str(tmp_path / "b.jsonl")}
    predict.run(PredictConfig.model_validate(rows_as_json))
    lines = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert {line["key"]: line["error"] for line in lines if "error" in line} == faults


def test_without_a_file_it_prints(colours: Path, classifier: Path) -> None:
    file = colours / "val/red/24.png"
    result = CliRunner().invoke(cli.main, ["predict", f"init={classifier}", f"images=[{file},absent.jpg]", "top=1"])
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if not line.startswith(("INFO", "WARNING"))]
    assert lines[0] == "key,class_1,probability_1,error"
    assert lines[1].startswith(f"{file},")
    assert lines[2] == "absent.jpg,,,No such file or directory"


@pytest.mark.parametrize("student", [ENCODER, CONV], ids=["vit", "convvit"])
def test_an_export_knows_the_names(colours: Path, tmp_path: Path, student: dict[str, Any]) -> None:
    finetune.run(finetune_config(colours, tmp_path / "run", student=student, max_steps=1))
    export.run(export.ExportConfig(init=tmp_path / "run", output=tmp_path / "exported"))
    assert json.loads((tmp_path / "exported/config.json").read_text())["label_names"] == ["blue", "green", "red"]
    found, expected = (
        rows(tmp_path / f"{name}.csv", init=str(tmp_path / name), **photos(colours)) for name in ("exported", "run")
    )
    assert found == expected
    (tmp_path / "again").mkdir()
    facts = export.run(export.ExportConfig(init=tmp_path / "exported", output=tmp_path / "again/out"))
    assert facts["cosine"] >= 0.99999


@pytest.mark.parametrize("form", ["json list", "json mapping", "lines"])
def test_classes_that_are_numbers_get_names(
    colours: Path, tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["sky", "grass", "fire, or so"]
    file = tmp_path / ("names.txt" if form == "lines" else "names.json")
    mapping = {str(number): name for number, name in reversed(list(enumerate(names)))}
    file.write_text("\n".join(names) if form == "lines" else json.dumps(names if form == "json list" else mapping))
    assert read_class_names(file, 3) == tuple(names)
    if form != "lines":
        return
    members = {}
    for label, colour in enumerate(("blue", "green", "red")):
        for image in (colours / "val" / colour).iterdir():
            members |= {image.name: image.read_bytes(), f"{image.stem}.cls": str(label).encode()}
    write_tar(tmp_path / "a.tar", members)
    numbered = {"data": {"path": str(tmp_path / "a.tar"), "workers": 0}}
    keys = {"student": ENCODER, "max_steps": 1, "val": numbered["data"], **numbered}
    finetune.run(finetune_config(colours, tmp_path / "plain", **keys))
    assert {row["class_1"] for row in rows(tmp_path / "a.csv", init=str(tmp_path / "plain"), **numbered)} <= set("012")
    finetune.run(finetune_config(colours, tmp_path / "named", **keys, class_names=str(file)))
    found = rows(tmp_path / "b.csv", init=str(tmp_path / "named"), **numbered)
    assert {row["class_3"] for row in found} <= set(names)
    assert load_checkpoint(resolve_checkpoint(tmp_path / "named")).identity["class_names"] == names
    scored = finetune.EvaluateConfig(init=[tmp_path / "named"], val=numbered["data"], crop=1.0)
    assert set(finetune.evaluate(scored)["lowest"]) == set(names)
    assert "nothing tells" not in caplog.text  # numbers are compared with numbers
    # A run from before there were names goes on with them.
    finetune.run(finetune_config(colours, tmp_path / "plain", **{**keys, "max_steps": 2}, class_names=str(file)))
    with pytest.raises(ConfigError, match="class_names is for classes that are numbers"):
        finetune.run(finetune_config(colours, tmp_path / "x", student=ENCODER, class_names=str(file)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["a", "b"]', "holds 2 names, and there are 3 classes"),
        ('["a", "b", "b"]', "holds 2 names"),
        ('{"0": "a", "1": "b", "3": "c"}', "give a JSON list of names"),
        ('"abc"', "give a JSON list of names"),
        ("[1, 2", "can't be read"),
    ],
)
def test_names_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "names.json").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_class_names(tmp_path / "names.json", 3)
    assert "\n" not in str(caught.value)


def test_what_predict_refuses(colours: Path, student_run: Path, classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no classifier but a pre-trained student: fine-tune it first"):
        rows(tmp_path / "a.csv", init=str(student_run), **photos(colours))
    with pytest.raises(ConfigError, match=r"a\.txt: choose a name that ends with \.csv or \.jsonl"):
        rows(tmp_path / "a.txt", init=str(classifier), **photos(colours))


def test_each_class_is_scored_as_scikit_learn_does(colours: Path, classifier: Path, tmp_path: Path) -> None:
    """By --eval, in its record, on the report; and the confusion matrix is drawn."""
    names = ("blue", "green", "red")
    for place, file in enumerate(sorted((colours / "val").glob("*/*.png"))):  # each third photo in a wrong folder
        folder = tmp_path / "val" / names[(names.index(file.parent.name) + (place % 3 == 0)) % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file.name).symlink_to(file)
    val = {"path": str(tmp_path / "val"), "workers": 0}
    facts = finetune.evaluate(
        EvaluateConfig.model_validate({"init": [str(classifier)], "val": val, "output": str(tmp_path)})
    )
    predicted = probabilities(tmp_path, classifier).argmax(1).numpy()
    labels = open_labelled("val.path", DataConfig(**val)).labels
    recalls = recall_score(labels, predicted, average=None)
    assert facts["top1"] == (labels == predicted).mean() < 1
    classes = read_records(tmp_path / "metrics.json")["finetune_eval"]["classes"]
    assert classes == {
        name: {"images": (labels == label).sum(), "top1": pytest.approx(recalls[label])}
        for label, name in enumerate(names)
    }
    assert list(facts["lowest"].values()) == sorted(facts["lowest"].values())
    page = ParsedPage(Path(report.run(report.ReportConfig(paths=[tmp_path]))["page"]))
    table = page.tables[f"{tmp_path.name}, finetune eval: classes"]
    assert sorted(table.column("classes")) == sorted(classes)
    assert table.column("top1")[0].partition(" ")[0] == f"{100 * min(recalls):.2f}"
    assert "confusion.png" in page.pictures
    assert "classes" not in page.tables["Classification"].column("more")[0]  # they have their table


def test_a_confusion_matrix_is_scikit_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many classes the lowest are shown; one without images is not."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 59, 3000)
    predicted = np.where(random.random(3000) < 0.02 * (labels % 50), labels, random.integers(0, 60, 3000))
    drawn: list[np.ndarray] = []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", lambda self, shares, **_: drawn.append(shares))
    names = [f"$class {number}" for number in range(60)]
    draw_confusion(tmp_path / "a.png", labels, predicted, names, "a $title")
    accuracies = class_accuracies(labels, predicted, names)
    assert len(accuracies) == 59
    lowest = sorted(range(59), key=lambda label: accuracies[names[label]]["top1"])[:40]
    matrix = confusion_matrix(labels, predicted, normalize="true")
    np.testing.assert_allclose(drawn[0], matrix[np.ix_(sorted(lowest), sorted(lowest))])
    assert np.asarray(Image.open(tmp_path / "a.png")).std() > 10
