"""Rows on the disk and sums on the device, across a stop."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.training.metrics import Meter, MetricsWriter, read_metrics


def write_run(path: Path) -> None:
    writer = MetricsWriter(path, 0)
    writer.write(2, {"loss": 1.0, "lr": 0.1})
    writer.write(2, {"top1": 0.5})
    writer.write(4, {"loss": 0.5, "lr": 0.1})


def test_a_resumed_run_keeps_its_rows_and_knows_what_was_evaluated(tmp_path: Path) -> None:
    write_run(tmp_path / "metrics.jsonl")
    assert not MetricsWriter(tmp_path / "metrics.jsonl", 4, writes=False).was_evaluated(4)
    writer = MetricsWriter(tmp_path / "metrics.jsonl", 2)
    assert writer.was_evaluated(2)
    assert writer.latest == {"loss": 1.0, "lr": 0.1, "top1": 0.5}
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_only_one_process_writes(tmp_path: Path) -> None:
    MetricsWriter(tmp_path / "metrics.jsonl", 0, writes=False).write(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_kill_while_a_run_is_reopened_costs_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    class Killed(BaseException):
        """Like SIGKILL, nothing in the program handles it."""

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    path = tmp_path / "metrics.jsonl"
    write_run(path)
    before = path.read_text()
    with monkeypatch.context() as patch:
        if call == "write":
            patch.setattr(json, "dumps", die)
        else:
            patch.setattr(os, call, die)
        with pytest.raises(Killed):
            MetricsWriter(path, 4)
    assert path.read_text() == before


def test_a_cut_line_is_left_out_and_a_bad_one_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_run(path)
    with path.open("a") as file:
        file.write('{"step": 4, "to')
    assert len(read_metrics(path)) == 3
    path.write_text("\0\0\0\n" + path.read_text())
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is damaged .*: take the bad line out"):
        MetricsWriter(path, 4)


def test_a_meter_goes_on_in_the_middle_of_a_mean() -> None:
    values = torch.rand(7, generator=torch.Generator().manual_seed(0))
    whole, first = Meter(torch.device("cpu")), Meter(torch.device("cpu"))
    for value in values:
        whole.add({"loss": value})
    for value in values[:3]:
        first.add({"loss": value})
    first.norms["grad_norm"] = torch.tensor(2.0)
    kept = {"count": first.count, "sums": {"loss": float(first.sums["loss"])}, "norms": {"grad_norm": 2.0}}
    second = Meter(torch.device("cpu"), json.loads(json.dumps(kept)))
    for value in values[3:]:
        second.add({"loss": value})
    means, norms = second.take()
    assert torch.equal(means["loss"], whole.take()[0]["loss"])
    assert norms == {"grad_norm": 2.0}
    assert (second.count, second.sums, second.norms) == (0, {}, {})
