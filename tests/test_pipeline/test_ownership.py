"""What a stage leaves behind, and which error is told."""

import pytest

from pipeline.errors import DataError
from pipeline.ownership import closed_with_stage, stage


class Resource:
    """Notes that it was closed, and fails at it."""

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True
        raise RuntimeError("Connection closed by peer")


def test_the_first_error_is_told_whatever_leaving_meets() -> None:
    """A loader that was killed, in a job whose other processes leave at the same time."""
    resource = Resource()

    @stage
    def run() -> None:
        closed_with_stage(resource)
        raise DataError("the cause")

    with pytest.raises(DataError, match="the cause"):
        run()
    assert resource.closed


def test_an_error_of_leaving_alone_is_told() -> None:
    resource = Resource()
    with pytest.raises(RuntimeError, match="closed by peer"):
        stage(lambda: closed_with_stage(resource))()
