"""Weights into a teacher's network: fetched with one clear line, loaded strictly; `pipeline/weights.py` reads them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from pipeline.errors import CheckpointError, TeacherError
from pipeline.teachers.layouts import from_transformers
from pipeline.weights import read_state


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of `teacher.weights`, transformers' layouts turned into those of the models' own releases.

    Raises:
        TeacherError: no file of weights, or of a layout that is not known here.
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
    own = model.state_dict()
    problems = _summary("lacks", own.keys() - state.keys()) + _summary("has unknown", state.keys() - own.keys())
    problems += [
        f"has {key} as {list(state[key].shape)} where {list(own[key].shape)} is expected"
        for key in sorted(own.keys() & state.keys())
        if state[key].shape != own[key].shape
    ][:2]
    if problems:
        raise TeacherError(
            f"teacher.weights={source} doesn't fit the model: it {'; '.join(problems)}: choose the teacher "
            "that the file is of"
        )
    model.load_state_dict(state)


@contextmanager
def fetching(name: str, what: str) -> Iterator[None]:
    """Turn whatever a download raises into one line that names the file and the key that takes a local one."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:100] if str(error).strip() else type(error).__name__
        raise TeacherError(
            f"teacher '{name}' can't be fetched ({reason}): download {what} where there is a network "
            f"and give teacher.weights=FILE"
        ) from error


def _summary(verb: str, keys: set[str]) -> list[str]:
    """'lacks 12 tensors (blocks.0.attn.qkv.bias, ...)', or nothing."""
    if not keys:
        return []
    names = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
    return [f"{verb} {len(keys)} tensor{'s' if len(keys) > 1 else ''} ({names})"]
