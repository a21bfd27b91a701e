"""Checkpoints: whole or not there. A folder is written under a hidden name, fsynced, and renamed into place.

    checkpoints/step-00001000/
        model.safetensors   weights, by the reference code's names; their moving average where the run keeps one
        trained.safetensors the weights that the optimiser goes on from, only beside such an average
        model.json          how to build the model again
        optimizer.pt        AdamW's state (tensors and numbers only: loads with weights_only=True)
        checkpoint.json     step, identity of the run, length and xxh3-128 of each file above, and a digest of itself

`checkpoint.json` is written last: a folder without it, or that does not agree with it, is torn and never loaded.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import CheckpointError

log = logging.getLogger(__name__)

_RECORD = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """A sound checkpoint on disk."""

    path: Path
    step: int
    identity: dict[str, Any]  # what must not change between stop and resume
    metrics: dict[str, Any]

    def optimizer_state(self) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(self.path / "optimizer.pt", map_location="cpu", weights_only=True)
        return state


def save_checkpoint(
    path: Path,
    model: nn.Module,
    spec: Mapping[str, Any],
    *,
    step: int,
    identity: Mapping[str, Any],
    metrics: Mapping[str, Any],
    optimizer_state: Mapping[str, Any] | None = None,
    trained: nn.Module | None = None,
) -> None:
    """Write a checkpoint folder atomically, in place of one of the same name.

    `trained` is the model that the optimiser works on, where `model` is its moving average.

    Raises:
        CheckpointError: the disk is full or the folder can't be written; nothing half-written stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_contiguous(model.state_dict()), partial / "model.safetensors")
        if trained is not None:
            save_file(_contiguous(trained.state_dict()), partial / "trained.safetensors")
        (partial / "model.json").write_text(json.dumps(spec, indent=1), encoding="utf-8")
        if optimizer_state is not None:
            torch.save(optimizer_state, partial / "optimizer.pt")
        files = {file.name: _fingerprint(file) for file in sorted(partial.iterdir())}
        record = {"step": step, "identity": dict(identity), "metrics": dict(metrics), "files": files}
        (partial / _RECORD).write_text(json.dumps({**record, "digest": _digest(record)}, indent=1), encoding="utf-8")
        for file in partial.iterdir():
            _fsync(file)
        _fsync(partial)
        _replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk has a name of its own in each library
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"can't write checkpoint {path}: {error}; free some space or choose another output"
        ) from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Check every byte of a checkpoint folder against its record.

    Raises:
        CheckpointError: it is torn or no checkpoint.
    """
    try:
        record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
        if record.pop("digest") != _digest(record):
            raise CheckpointError(f"checkpoint {path} is damaged: {_RECORD} is not what was written")
        for name, expected in record["files"].items():
            if _fingerprint(path / name) != expected:
                raise CheckpointError(f"checkpoint {path} is damaged: {name} is not what was written")
        return Checkpoint(path, int(record["step"]), dict(record["identity"]), dict(record["metrics"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no complete checkpoint ({error})") from error


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest sound `step-*` checkpoint in a `checkpoints/` folder; torn ones are skipped with a warning."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            log.warning("skipped: %s", error)
    return None


def resolve_checkpoint(path: Path) -> Path:
    """What `init` may name: a weights file, a checkpoint folder, or a run folder (its newest sound checkpoint).

    Raises:
        CheckpointError: nothing usable there.
    """
    if path.is_file() or (path / "model.safetensors").is_file():
        return path
    newest = newest_checkpoint(path / "checkpoints") if path.is_dir() else None
    if newest is None:
        what = "holds no complete checkpoint" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {what}: give a run folder, a checkpoint folder, a .safetensors or a .pth file")
    return newest.path


def prune(folder: Path, keep: int, newest: str) -> None:
    """Of the checkpoints up to `newest`, delete all but the last `keep`, and what killed runs left half-written.

    Later ones than `newest`, which was just written, are torn: they don't count.
    """
    for path in sorted(path for path in folder.glob("step-*") if path.name <= newest)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _digest(record: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True).encode())


def _fingerprint(file: Path) -> dict[str, Any]:
    hasher, length = xxhash.xxh3_128(), 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            hasher.update(block)
            length += len(block)
    return {"bytes": length, "xxh3_128": hasher.hexdigest()}


def _replace(source: Path, target: Path) -> None:
    """Rename a folder over another; between the two renames the old one is still there under a hidden name."""
    old = target.with_name(f".{target.name}.old.partial")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    source.rename(target)
    _fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
