"""Fixtures that the tests on a GPU share with those of the stages."""

import pytest

from tests.test_stages.conftest import colours
from tests.test_stages.test_detect import annotated

__all__ = ["annotated", "colours"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; run with `make test-gpu`")
