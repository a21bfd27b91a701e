"""Weights for a teacher's network: read by `pipeline/weights.py`, loaded strictly, or fetched from a hub."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from pipeline.errors import CheckpointError, TeacherError
from pipeline.teachers.layouts import from_transformers
from pipeline.weights import misfit, read_state


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of `teacher.weights`, transformers' layouts turned into those of the models' own releases.

    Raises:
        TeacherError: no file of weights, or an unknown layout.
    """
    try:
        return from_transformers(read_state(file), str(file))
    except CheckpointError as error:
        raise TeacherError(f"teacher.weights={error}") from error


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy a state dict into a model, every key and every shape.

    Raises:
        TeacherError: one line with what is missing, extra or of another shape.
    """
    if problem := misfit(model.state_dict(), state):
        raise TeacherError(
            f"teacher.weights={source} doesn't fit the model ({problem}): choose the teacher that the file is of"
        )
    model.load_state_dict(state)


@contextmanager
def fetching(name: str, what: str) -> Iterator[None]:
    """Turn any error of a download into one line with the file to fetch and the key that takes a local one."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:100] if str(error).strip() else type(error).__name__
        raise TeacherError(
            f"teacher '{name}' can't be fetched ({reason}): download {what} where there is a network "
            f"and give teacher.weights=FILE"
        ) from error
