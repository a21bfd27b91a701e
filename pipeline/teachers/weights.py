"""Weights from a file or the hub into a network: read safely, loaded strictly, one clear line when they don't fit."""

import hashlib
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.errors import TeacherError

# Where public checkpoints keep the weights when the file holds more than them.
WRAPPERS = ("state_dict", "model", "teacher")


def read_state(file: Path) -> dict[str, Tensor]:
    """Read a state dict on the CPU: safetensors, or a .pth that torch opens with `weights_only=True`.

    Raises:
        TeacherError: no such file, a torn one, or one that holds more than tensors.
    """
    if not file.is_file():
        raise TeacherError(f"teacher.weights={file}: no such file")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TeacherError(
            f"teacher.weights={file} is no file of plain tensors ({reason[:120]}): save its state_dict as safetensors"
        ) from error
    return _unwrap(loaded, file)


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy a state dict into a model, every key and every shape.

    Raises:
        TeacherError: one line with what is missing, extra or of another shape.
    """
    own = model.state_dict()
    problems = _summary("lacks", own.keys() - state.keys()) + _summary("has unknown", state.keys() - own.keys())
    problems += [
        f"{key} is {list(state[key].shape)} where {list(own[key].shape)} is expected"
        for key in sorted(own.keys() & state.keys())
        if state[key].shape != own[key].shape
    ][:2]
    if problems:
        raise TeacherError(f"teacher.weights={source} doesn't fit the model: it {'; '.join(problems)}")
    model.load_state_dict(state)


def state_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes in the order of the names, so that no file format shows."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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


def _unwrap(loaded: object, file: Path) -> dict[str, Tensor]:
    """The dict of tensors inside a checkpoint, without the `module.` that data-parallel training adds."""
    state = loaded
    for key in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TeacherError(f"teacher.weights={file} holds no state dict: save one as safetensors")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _summary(verb: str, keys: set[str]) -> list[str]:
    """'lacks 12 tensors (blocks.0.attn.qkv.bias, ...)', or nothing."""
    if not keys:
        return []
    names = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
    return [f"{verb} {len(keys)} tensor{'s' if len(keys) > 1 else ''} ({names})"]
