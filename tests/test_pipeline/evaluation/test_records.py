"""metrics.json: added to, and never in the way."""

from pathlib import Path

import pytest

from pipeline.evaluation.records import read_records, write_record


def test_entries_add_up_and_the_newest_of_a_name_stays(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write_record(folder, "knn", {"top1": 0.5})
    write_record(folder, "linear_probe", {"top1": 0.6})
    write_record(folder, "knn", {"top1": 0.7})
    records = read_records(folder / "metrics.json")
    assert {name: record["top1"] for name, record in records.items()} == {"knn": 0.7, "linear_probe": 0.6}
    assert [path.name for path in folder.iterdir()] == ["metrics.json"]
    write_record(None, "knn", {})


def test_a_torn_file_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for content in ('{"knn": {"top1": 0.', "[1, 2]"):
        (tmp_path / "metrics.json").write_text(content)
        write_record(tmp_path, "linear_probe", {"top1": 0.6})
        assert (tmp_path / "metrics.json.damaged").read_text() == content
        assert list(read_records(tmp_path / "metrics.json")) == ["linear_probe"]
    assert "it is kept as" in caplog.text


def test_a_file_that_is_none_of_ours_holds_no_entries(tmp_path: Path) -> None:
    for content in ("", "[1, 2]", "{"):
        (tmp_path / "metrics.json").write_text(content)
        assert read_records(tmp_path / "metrics.json") == {}
    assert read_records(tmp_path / "absent.json") == {}
