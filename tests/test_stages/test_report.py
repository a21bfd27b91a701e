"""report: a page of a run, of several, and of what isn't one."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import CheckpointError, ConfigError
from pipeline.evaluation.records import write_record
from stages import finetune, report
from stages.report import ReportConfig
from tests.test_stages.conftest import ENCODER, finetune_config


def page_of(folder: Path) -> str:
    facts = report.run(ReportConfig(path=folder))
    return Path(facts["page"]).read_text()


def test_a_run_with_all_there_is(colours: Path, tmp_path: Path) -> None:
    finetune.run(finetune_config(colours, tmp_path, student=ENCODER, max_steps=4, log_every=1))
    write_record(tmp_path, "knn", {"top1": 0.5, "top5": 0.75})
    write_record(tmp_path / "probe", "linear_probe", {"top1": 0.25, "lr": 1 / 3, "all": [{"lr": 1 / 3}, {"lr": 3.0}]})
    Image.new("RGB", (9, 9)).save(tmp_path / "visualize.png")
    (tmp_path / "broken.png").write_text("no picture")
    text = page_of(tmp_path)
    for said in (
        "knn",
        "50.00%",
        "75.00%",
        "linear probe",
        "25.00%",
        "lr 0.3333, all (lr 0.3333; lr 3)",
        "validation, best",
        "batch_size: 8",
        "visualize.png",
    ):
        assert said in text, said
    assert "broken.png" not in text
    curves = re.findall(r'alt="([\w/]+) by step"', text)
    assert curves[:2] == ["loss", "top1"]
    assert {"lr", "images_per_s", "grad_norm"} <= set(curves)
    assert all(source.startswith("data:image/") for source in re.findall(r'(?:src|href)="([^"]*)"', text))
    assert not re.search(r"<script|<link|@import", text)


def test_detection_has_a_table_of_its_own(tmp_path: Path) -> None:
    """A folder with nothing but `detect --eval`'s record is shown; so is what was logged while it trained."""
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    figures = [0.123, 0.456, 0.1, 0.05, 0.2, -1.0]
    record = {f"{kind}_{name}": value for kind in ("box", "mask") for name, value in zip(names, figures, strict=True)}
    write_record(tmp_path, "detect", record | {"mask_AP": 0.0987})
    cells = re.findall(r"<td>(.*?)</td>", page_of(tmp_path))
    assert cells == [
        *("(here)", "detect", "boxes", "0.123", "0.456", "0.100", "0.050", "0.200", "–"),
        *("(here)", "detect", "masks", "0.099", "0.456", "0.100", "0.050", "0.200", "–"),
    ]
    rows = [{"step": 5, "loss": 1.0}, {"step": 5, **record, "box_AP": 0.5}, {"step": 9, **record}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page_of(tmp_path)
    assert re.findall(r"<td>(validation.*?)</td>", text) == [
        *["validation, last (step 9)"] * 2,
        *["validation, best (step 5)"] * 2,
    ]
    assert "<td>0.500</td>" in text
    assert "<h2>Evaluations</h2>" not in text
    assert re.findall(r'alt="([\w/]+) by step"', text)[:3] == ["loss", "box_AP", "mask_AP"]


def test_several_runs_share_a_page(tmp_path: Path) -> None:
    for name, loss in (("mae", 1.0), ("mr_mae", 0.5)):
        (tmp_path / name).mkdir()
        rows = [{"step": step, "loss": loss / step, "images_per_s": 64.0} for step in (1, 10)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / name / "config.yaml").write_text("batch_size: 64\n")
    (tmp_path / "results.json").write_text(json.dumps({"mae": {"k-NN": 0.8}, "teacher <b>": {"k-NN": 0.9}}))
    text = page_of(tmp_path)
    for said in ("<td>mae</td>", "<td>mr_mae</td>", "80.00%", "teacher &lt;b&gt;", "0 min 10 s"):
        assert said in text, said


def test_a_run_of_another_hand_is_escaped(tmp_path: Path) -> None:
    evil = "<img src=//host/x onerror=alert(1)>"
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, evil: 1.0}) + "\n")
    (tmp_path / "config.yaml").write_text(evil)
    write_record(tmp_path, evil, {"top1": 0.5, evil: evil})
    text = page_of(tmp_path)
    assert "<img src=//" not in text
    assert text.count("&lt;img src=//") >= 3


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        report.run(ReportConfig(path=tmp_path / "absent"))
    with pytest.raises(CheckpointError, match="holds no run"):
        report.run(ReportConfig(path=tmp_path))
    with pytest.raises(ConfigError, match=r"--output \. is a folder: give the page a name in it"):
        report.run(ReportConfig(path=tmp_path, output=Path()))
    (tmp_path / "metrics.jsonl").write_text("{torn\n")
    with pytest.raises(CheckpointError, match="is damaged"):
        report.run(ReportConfig(path=tmp_path))
