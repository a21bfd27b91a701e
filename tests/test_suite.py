"""The suite itself: where its tests run, and how they start the command."""

import os
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import asks_for_gpu


def test_no_test_of_this_run_sees_a_gpu() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""  # nor does a process that a test starts
    assert torch.cuda.device_count() == 0


@pytest.mark.parametrize(
    ("markexpr", "asked"),
    [
        ("", False), ("not slow and not gpu", False), ("not (slow or gpu)", False), ("slow and not gpu", False),
        ("gpu", True), ("gpu and not slow", True),
    ],
)  # fmt: skip
def test_only_a_run_of_gpu_tests_sees_gpus(markexpr: str, asked: bool) -> None:
    assert asks_for_gpu(SimpleNamespace(option=SimpleNamespace(markexpr=markexpr))) == asked  # type: ignore[arg-type]
