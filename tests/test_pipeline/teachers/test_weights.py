"""Weights into a network: loaded strictly, refused in one line."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import TeacherError
from pipeline.teachers.weights import load_strictly, read_weights

STATE = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}


def test_the_readers_line_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"^teacher.weights=.*absent.pth: no such file"):
        read_weights(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": STATE["weight"]}, r"\(missing: bias\): choose the teacher"),
        (
            {**STATE, **{f"x{i}": torch.ones(1) for i in range(8)}},
            r"\(extra: x0, x1, x2, x3, x4, x5 and 2 more\): choose the teacher",
        ),
        (
            {**STATE, "bias": torch.ones(7)},
            r"\(of another shape: bias \[7\] for \[2\]\): choose the teacher",
        ),
        (
            {"other": torch.ones(1)},
            r"\(missing: weight, bias; extra: other\): choose the teacher",
        ),
    ],
)
def test_weights_that_do_not_fit(state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(TeacherError, match=f"teacher.weights=file doesn't fit the model {message}"):
        load_strictly(nn.Linear(3, 2), state, "file")
