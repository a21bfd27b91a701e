"""Tables of results: what a cell says, and which rows stand together."""

import math

import pytest

from pipeline.evaluation.scores import Evaluation, score_tables, show_score, validations


@pytest.mark.parametrize(
    ("name", "value", "images", "cell"),
    [
        ("top1", 0.5, 400, "50.00 ± 2.50 %"),
        ("top5", 0.9, 100, "90.00 ± 3.00 %"),
        ("top1", 0.5, None, "50.00 %"),
        ("top1", None, 400, "–"),
        ("top1", math.nan, 400, "nan %"),
        ("mIoU", 0.123456, 400, "12.35 %"),  # pixels are no independent draws
        ("AP75", 0.5, 100, "0.500"),
        ("AP_small", -1.0, 100, "–"),
        ("lr", 1 / 3, None, "0.3333"),
        ("images", 12345, None, "12,345"),
        ("name", "a <b>", None, "a <b>"),
    ],
)
def test_cells(name: str, value: object, images: int | None, cell: str) -> None:
    assert show_score(name, value, images) == cell


def test_rows_of_one_command_stand_together() -> None:
    found = [
        Evaluation(run, None, what, {"top1": 0.5, "k": 20, "made": {"device": "CPU"}, "each": {"x": 0.5}})
        for run in ("a", "b")
        for what in ("knn", "linear probe")
    ]
    (table,) = score_tables(found)
    assert [(row.group, row.cells[0]) for row in table.rows] == [
        ("knn", "a"), ("knn", "b"), ("linear probe", "a"), ("linear probe", "b"),
    ]  # fmt: skip
    assert table.rows[0].cells[-1] == "k 20, each (x 0.5)"


def test_the_best_is_told_only_where_it_is_not_the_last() -> None:
    rising = [{"step": step, "knn_top1": 0.1 * step, "loss": 1.0} for step in (1, 2)]
    falling = [{"step": step, "knn_top1": 1 / step} for step in (1, 2)]
    for rows, groups in ((rising, ["knn, last"]), (falling, ["knn, last", "knn, best"])):
        (table,) = score_tables([Evaluation("run", None, what, scores) for what, scores in validations(rows)])
        assert [row.group for row in table.rows] == groups
    assert table.rows[1].cells == ["run", "100.00 %", "–", "–", "–", "step 1"]


def test_many_classes_are_cut_to_the_lowest() -> None:
    classes = {f"class {number}": {"images": 10, "top1": (number * 7 % 60) / 60} for number in range(60)}
    _, table = score_tables([Evaluation("run", None, "finetune eval", {"top1": 0.5, "classes": classes})])
    assert table.title == "run, finetune eval: classes (the 40 lowest of 60)"
    assert table.folded
    assert table.rows[1].cells == ["class 43", "10", "1.67 ± 4.05 %"]
    assert len(table.rows) == 40
