"""report: a page of a run, of several, and of what isn't one."""

import base64
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from omegaconf import OmegaConf
from PIL import Image

import cli
from pipeline.config import config_text
from pipeline.errors import CheckpointError, ConfigError
from pipeline.evaluation.records import write_record
from stages import finetune, report
from stages.report import ReportConfig
from tests.pages import ParsedPage
from tests.test_stages.conftest import ENCODER, finetune_config, pretrain_config


def page_of(*folders: Path, output: Path | None = None) -> ParsedPage:
    facts = report.run(ReportConfig(paths=folders, output=output))
    return ParsedPage(Path(facts["page"]))


def write_run(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Path:
    """A pre-training's folder as an earlier version left it, without starts.jsonl."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"data": {"path": "photos"}, "cache": {"path": "cached"}}
    (folder / "config.yaml").write_text(config_text(pretrain_config(folder, **{**keys, **changes})))
    return folder


def losses(loss: float, **more: float) -> list[dict[str, Any]]:
    return [{"step": step, "loss": loss / step, "images_per_s": 64.0, **more} for step in (1, 10)]


def strokes(source: str) -> set[str]:
    """The colours of the lines in an SVG."""
    svg = base64.b64decode(source.partition(",")[2]).decode()
    return set(re.findall(r"fill: none; (?:stroke-dasharray: [\d., ]+; [^\"]*?)?stroke: (#\w{6})", svg))


def test_a_run_with_all_there_is(colours: Path, tmp_path: Path) -> None:
    run = tmp_path / "tuned"
    finetune.run(finetune_config(colours, run, student=ENCODER, max_steps=4, log_every=1))
    write_record(run, "knn", {"top1": 0.5, "top5": 0.75, "images": 400})
    write_record(run / "probe", "linear_probe", {"top1": 0.25, "lr": 1 / 3, "all": [{"lr": 1 / 3}, {"lr": 3.0}]})
    Image.new("RGB", (9, 9)).save(run / "visualize.png")
    (run / "broken.png").write_text("no picture")
    page = page_of(run)
    table = page.tables["Classification"]
    shown = {(row[0], group): row for row, group in zip(table.rows, table.groups, strict=True)}
    assert shown["tuned", "knn"][1:4] == ["50.00 ± 2.50 %", "75.00 ± 2.17 %", "400"]
    assert shown["probe", "linear probe"][1:4] == ["25.00 %", "–", "–"]
    assert shown["probe", "linear probe"][-1] == "lr 0.3333"
    assert page.tables["probe, linear probe: all"].column("lr") == ["0.3333", "3"]
    validation = shown["tuned", "validation, last"]
    assert validation[3] == "12"
    top1 = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["top1"]
    assert validation[1] == f"{100 * top1:.2f} ± {100 * math.sqrt(top1 * (1 - top1) / 12):.2f} %"
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d", date) for date in table.column("date"))
    training = page.tables["Training"]
    assert training.column("command") == ["finetune"]
    assert training.column("machine")[0].startswith("CPU, ")
    assert page.commands  # of the training and of the evaluations, which are the same here
    made = {name.rpartition(",")[0] for name, _ in page.items}
    assert {"tuned: finetune", "tuned: knn", "probe: linear probe"} <= made
    assert "batch_size: 8" in page.text
    assert "visualize.png" in page.pictures
    assert "broken.png" not in page.pictures
    assert page.curves()[0] == "loss by step"
    assert {"lr by step", "grad_norm by step"} <= set(page.curves())
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not {"script", "link", "iframe"} & page.tags


def test_nothing_says_on_which_host_or_where_the_program_lies(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", losses(1.0))
    start = {"time": "2026-01-02T03:04:05+00:00", "host": "lonely-host", "folder": "/home/somebody", "device": "H100",
             "command": "/home/somebody/bin/mrmae pretrain output=run", "versions": {"torch": "2.8"}}  # fmt: skip
    (run / "starts.jsonl").write_text(json.dumps(start) + "\n" + json.dumps({**start, "processes": 8}) + "\n")
    page = page_of(run)
    assert page.commands == ["mrmae pretrain output=run"] * 2  # on one process, and on eight
    assert "H100, 8 processes, torch 2.8" in page.text
    assert page.tables["Training"].column("started") == ["2026-01-02 03:04"]
    assert "lonely-host" not in page.text
    assert "somebody" not in page.text


def test_folders_of_earlier_versions(tmp_path: Path) -> None:
    """No starts, no images, no config, a config of fewer keys: dashes, and no error."""
    run = write_run(tmp_path / "old", losses(1.0))
    write_record(run, "knn", {"top1": 0.5})
    records = json.loads((run / "metrics.json").read_text())
    del records["knn"]["made"]
    (run / "metrics.json").write_text(json.dumps(records))
    bare = write_run(tmp_path / "bare", losses(2.0))
    (bare / "config.yaml").unlink()
    page = page_of(tmp_path)
    assert page.tables["Classification"].rows == [["old", "50.00 %", "–", "–", "–", ""]]
    assert page.tables["Training"].column("started") == ["–", "–"]
    assert page.tables["Training"].column("command") == ["–", "pretrain"]
    assert page.commands == []
    # What a loss without a config is of, nobody can say.
    assert {alt for alt in page.curves() if alt.startswith("loss")} == {
        "loss by step, no config.yaml", "loss by step, pretrain",
    }  # fmt: skip


def test_detection_has_a_table_of_its_own(tmp_path: Path) -> None:
    """A folder with nothing but `detect --eval`'s record is shown; so is what was logged while it trained."""
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    figures = [0.123, 0.456, 0.1, 0.05, 0.2, -1.0]
    record = {f"{kind}_{name}": value for kind in ("box", "mask") for name, value in zip(names, figures, strict=True)}
    folder = tmp_path / "found"
    write_record(folder, "detect", record | {"mask_AP": 0.0987})
    table = page_of(folder).tables["Detection"]
    assert table.groups == ["detect", "detect"]
    assert [row[:8] for row in table.rows] == [
        ["found", "boxes", "0.123", "0.456", "0.100", "0.050", "0.200", "–"],
        ["found", "masks", "0.099", "0.456", "0.100", "0.050", "0.200", "–"],
    ]
    rows = [{"step": 5, "loss": 1.0}, {"step": 5, **record, "box_AP": 0.5}, {"step": 9, **record}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(folder)
    table = page.tables["Detection"]
    groups = ["validation, last", "validation, best", "detect"]
    assert table.groups == [name for name in groups for _ in range(2)]
    assert table.column("more")[:4] == ["step 9", "step 9", "step 5", "step 5"]
    assert table.column("AP")[2] == "0.500"
    assert "Classification" not in page.tables
    assert page.curves() == ["box_AP by step"]  # nothing else has two values
    assert page.tables["Losses"].rows == [["found", "1"]]


def test_several_runs_share_a_page(tmp_path: Path) -> None:
    for name, loss in (("mae", 1.0), ("mr_mae", 0.5)):
        write_run(tmp_path / name, losses(loss), batch_size=64, optim={"lr": loss})
    (tmp_path / "results.json").write_text(json.dumps({"mae": {"k-NN": 0.8}, "teacher <b>": {"probe": 0.9}}))
    write_record(tmp_path, "demo", {"images": 100})
    page = page_of(tmp_path)
    grid = page.tables[f"Results of {tmp_path.name}: top-1"]
    assert grid.columns == ["of", "k-NN", "probe"]
    assert grid.rows == [["mae", "80.00 ± 4.00 %", "–"], ["teacher <b>", "–", "90.00 ± 3.00 %"]]
    training = page.tables["Training"]
    assert training.column("run") == ["mae", "mr_mae"]
    assert training.column("trained for") == ["0 min 10 s"] * 2
    differences = page.tables["What differs between the runs of pretrain"]
    assert differences.columns == ["run", "optim.lr"]
    assert differences.rows == [["mae", "1.0"], ["mr_mae", "0.5"]]
    # Each run has its line in every table, in the legend and in the plots.
    assert training.lines == differences.lines == [line for _, line in page.items[:2]]
    assert grid.lines == [training.lines[0], ("", "")]
    assert len(set(training.lines)) == 2
    assert strokes(page.pictures["loss by step"]) >= {colour for colour, _ in training.lines}


def test_a_run_keeps_its_colour_where_another_lacks_the_metric(tmp_path: Path) -> None:
    write_run(tmp_path / "a", losses(1.0))
    write_run(tmp_path / "b", [{"step": step, "loss": 1.0 / step, "mfu": 0.1 * step} for step in (1, 2)])
    page = page_of(tmp_path)
    first, second = (colour for colour, _ in page.tables["Training"].lines)
    drawn = strokes(page.pictures["mfu by step"])
    assert second in drawn
    assert first not in drawn


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({"optim": {"lr": 0.5}, "seed": 3, "batch_size": 16}, {"loss", "mimic_loss", "pixel_loss"}),
        ({"student": {"name": "mrmae_vit_small_patch16", "image_size": 64}}, {"loss", "mimic_loss", "pixel_loss"}),
        ({"mimic": {"mimic_weight": 3.0}}, {"mimic_loss", "pixel_loss"}),
        ({"mimic": {"mimic_loss": "smooth_l1"}}, {"pixel_loss"}),
        ({"mimic": {"target_scale": 1.0}}, {"pixel_loss"}),
        ({"mimic": {"target_norm": "none"}}, {"pixel_loss"}),
        ({"mimic": {"norm_pix_loss": False}}, {"mimic_loss"}),
        ({"mask": {"mask_ratio": 0.5}}, set()),
        ({"mask": {"focus": "random"}}, set()),
        ({"cache": {"path": "another"}}, set()),
        ({"cache": {"path": "cached", "local": "elsewhere"}}, {"loss", "mimic_loss", "pixel_loss"}),
        ({"data": {"path": "photos", "limit": 5}}, set()),
        ({"data": {"path": "photos", "workers": 7}}, {"loss", "mimic_loss", "pixel_loss"}),
    ],
)
def test_losses_share_an_axis_where_they_mean_the_same(
    tmp_path: Path, changes: dict[str, Any], shared: set[str]
) -> None:
    rows = [{**row, "pixel_loss": row["loss"], "mimic_loss": row["loss"], "lr": row["loss"]} for row in losses(1.0)]
    write_run(tmp_path / "a", rows)
    write_run(tmp_path / "b", rows, **changes)
    curves = page_of(tmp_path).curves()
    for metric in ("loss", "mimic_loss", "pixel_loss"):
        plots = [alt for alt in curves if alt.startswith(f"{metric} by step")]
        assert len(plots) == (1 if metric in shared else 2), (metric, plots)
        if metric not in shared:  # each plot says why, in the words of a key
            key = "=" in plots[0] and plots[0].partition("step, ")[2].partition("=")[0]
            assert key.split(".")[0] in changes, plots
    assert "lr by step" in curves


def test_keys_that_an_earlier_version_lacks_part_no_runs(tmp_path: Path) -> None:
    for name in ("old", "new"):
        write_run(tmp_path / name, losses(1.0))
    config = OmegaConf.load(tmp_path / "old/config.yaml")
    del config.mimic.resize_targets
    OmegaConf.save(config, tmp_path / "old/config.yaml")
    assert "loss by step" in page_of(tmp_path).curves()


def test_without_a_teacher_masks_are_random_whatever_the_key_says(tmp_path: Path) -> None:
    rows = [{**row, "pixel_loss": row["loss"]} for row in losses(1.0)]
    for name, focus in (("a", "sampled"), ("b", "random")):
        write_run(tmp_path / name, rows, cache=None, mimic={"objective": "mae"}, mask={"focus": focus})
    assert {"loss by step", "pixel_loss by step"} <= set(page_of(tmp_path).curves())


def test_a_single_value_is_text(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 2.0, "top1": 0.5}, {"step": 2, "loss": 1.0, "memory_gib": 3.0, "lr": math.nan}]
    write_run(tmp_path / "run", rows)
    page = page_of(tmp_path / "run")
    assert page.curves() == ["loss by step"]
    assert page.tables["Scores"].rows == [["run", "0.5"]]
    single = page.tables["Speed, rate and gradients"]
    assert single.columns == ["one value", "lr", "memory_gib"]
    assert single.rows == [["run", "nan", "3"]]


def test_runs_of_one_name_are_told_apart_and_a_folder_given_twice_is_shown_once(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path / place / "photos", losses(1.0)) for place in ("x", "y"))
    for run in (first, second):
        Image.new("RGB", (9, 9)).save(run / "visualize.png")
    page = page_of(first, second, first, tmp_path / "x", output=tmp_path / "page.html")
    assert page.tables["Training"].column("run") == ["x/photos", "y/photos"]
    assert [alt for alt in page.pictures if alt.endswith(".png")] == [
        "x/photos/visualize.png", "y/photos/visualize.png",
    ]  # fmt: skip
    assert "None yet: knn" in page.text
    assert "Nothing but the folder: they have the same config." in page.text


def test_twenty_runs_have_twenty_lines(tmp_path: Path) -> None:
    for number in range(20):
        write_run(tmp_path / f"run{number:02}", losses(1.0 + number))
    page = page_of(tmp_path)
    lines = page.tables["Training"].lines
    assert len(set(lines)) == 20
    assert len({colour for colour, _ in lines}) == 8
    assert [line for _, line in page.items[:20]] == lines


def test_a_run_of_another_hand_is_escaped(tmp_path: Path) -> None:
    evil = "<img src=//host/x onerror=alert(1)>"
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, evil: 1.0}) + "\n")
    (tmp_path / "config.yaml").write_text(evil)
    (tmp_path / "starts.jsonl").write_text(json.dumps({"command": f"{evil} '", "device": evil, "time": 7}) + "\n")
    write_record(tmp_path, evil, {"top1": 0.5, evil: evil, "all": [{evil: evil}], "made": evil})
    page = page_of(tmp_path)
    assert not page.pictures
    assert page.text.count(evil) >= 6
    assert f"{evil} '" in page.commands


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", losses(1.0))
    (tmp_path / "empty").mkdir()
    for paths, complaint in (([tmp_path / "absent"], "absent does not exist"), ([run, tmp_path / "empty"], "no run")):
        with pytest.raises(CheckpointError, match=complaint):
            page_of(*paths)
    with pytest.raises(ConfigError, match=r"--output \. is a folder: give the page a name in it"):
        page_of(run, output=Path())
    monkeypatch.chdir(tmp_path)
    page_of(run, write_run(tmp_path / "other", losses(1.0)))
    assert (tmp_path / "report.html").is_file()  # of several: here
    (run / "metrics.jsonl").write_text("{torn\n")
    with pytest.raises(CheckpointError, match="is damaged"):
        page_of(run)


def test_the_command_takes_folders_and_answers_in_one_line(tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / name, losses(1.0))) for name in ("a", "b")]
    done = CliRunner().invoke(cli.main, ["report", *runs, "--output", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    assert "runs         2" in done.output
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(cli.main, ["report", *runs, str(tmp_path / "empty")])
    assert done.exit_code == 2
    assert done.output == (
        f"error: {tmp_path}/empty holds no run (no metrics.jsonl, no metrics.json): give an output folder\n"
    )
    assert CliRunner().invoke(cli.main, ["report"]).exit_code == 2
