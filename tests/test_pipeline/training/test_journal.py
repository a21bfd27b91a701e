"""What a run says at its start, under way and at its end, and what it keeps of each start."""

import json
import logging
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from pipeline.training import journal
from pipeline.training.interruption import Interruption
from pipeline.training.journal import Pace, command, duration
from pipeline.training.metrics import read_metrics
from stages import pretrain
from tests.test_stages.conftest import pretrain_config


def test_a_run_says_what_it_does_and_what_to_do_next(
    image_tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = {"path": str(image_tree), "workers": 0}
    keys = {"data": data, "mimic": {"objective": "mae"}, "views": {"image_size": 64}, "max_steps": 2}
    config = pretrain_config(tmp_path / "a run", **keys)
    with caplog.at_level(logging.INFO):
        pretrain.run(config)
    text = caplog.text
    for line in (
        f"device: CPU, {torch.get_num_threads()} threads; precision: fp32",
        "an epoch: 3 steps of 8 images; in all 2 steps",
        "learning rate: up to 0.001 (optim.lr) after 0 steps of warm-up, then a cosine down to 0",
        f"output: {tmp_path}/a run (metrics.jsonl, train.log, checkpoints/)",
        f"done: 2 steps. Weights in {tmp_path}/a run/checkpoints/step-00000002; curves in",
        f"mrmae report '{tmp_path}/a run'",
        f"mrmae knn 'init={tmp_path}/a run' data.path={image_tree} val.share=0.1",
    ):
        assert line in text
    kept = (tmp_path / "a run/train.log").read_text()
    assert re.match(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} INFO device: CPU", kept)
    assert "finished" not in kept

    caplog.clear()
    with caplog.at_level(logging.INFO):
        pretrain.run(config)
    assert "this run is finished: all 2 steps were trained before. More epochs or max_steps train on" in caplog.text
    starts = [json.loads(line) for line in (tmp_path / "a run/starts.jsonl").read_text().splitlines()]
    assert [start["first_step"] for start in starts] == [0, 2]
    assert starts[0]["versions"]["torch"] == torch.__version__
    assert {"time", "host", "command", "commit", "folder"} <= starts[0].keys()
    assert starts[0]["evaluated_images"] is None  # nothing is


def test_the_log_is_written_without_anybody_listening(image_tree: Path, tmp_path: Path) -> None:
    """As from Python, or with -q: the file has the lines, and what failed; the handlers are gone afterwards."""
    data = {"path": str(image_tree), "workers": 0}
    keys = {"data": data, "mimic": {"objective": "mae"}, "views": {"image_size": 64}, "max_steps": 2}
    pretrain.run(pretrain_config(tmp_path / "run", **keys))
    lines = (tmp_path / "run/train.log").read_text().splitlines()
    assert sum("device: CPU" in line for line in lines) == 1
    assert not [
        handler for handler in logging.getLogger("pipeline").handlers if isinstance(handler, logging.FileHandler)
    ]


def test_a_line_after_ten_seconds_and_then_every_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 1000.0
    monkeypatch.setattr(journal.time, "monotonic", lambda: clock)
    pace, lines = Pace(400), {}
    for done in range(101, 301):  # a run that goes on from step 100, two seconds a step
        clock += 2.0
        line = pace.line(done, {"loss": 0.51234, "images_per_s": 31.4, "data_wait": 0.013})
        if line:
            lines[done] = line
    assert list(lines) == [106, 136, 166, 196, 226, 256, 286]
    assert lines[106] == "step 106 of 400 (26%), loss 0.5123, images_per_s 31.4, data_wait 1%, 10 min left"


@pytest.mark.parametrize(
    ("seconds", "text"), [(40, "40 s"), (150, "2 min"), (5400, "90 min"), (12_600, "3.5 h"), (200_000, "2.3 days")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_shell_takes_the_shown_command() -> None:
    line = command("knn", "init=runs/my run", "data.path=it's")
    done = subprocess.run(["bash", "-c", f"mrmae() {{ printf '%s|' \"$@\"; }}; {line}"], capture_output=True, text=True)
    assert done.stdout == "knn|init=runs/my run|data.path=it's|"


def test_the_first_signal_is_answered_at_once_and_the_second_ends(capfd: pytest.CaptureFixture[str]) -> None:
    with Interruption("stopping after this step") as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.requested
        assert capfd.readouterr().err == "\nstopping after this step\n"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert capfd.readouterr().err == ""


def test_a_start_that_was_killed_while_it_was_noted_spoils_no_other(tmp_path: Path) -> None:
    """`report` reads them."""
    (tmp_path / "starts.jsonl").write_text('{"step": 1}\n{"host": "mach')
    started = journal.Journal(tmp_path)
    started.record_start({"step": 2})
    started.close()
    assert [row["step"] for row in read_metrics(tmp_path / "starts.jsonl")] == [1, 2]
