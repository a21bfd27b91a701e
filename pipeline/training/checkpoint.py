"""Checkpoints: whole or not there. A folder is written under a hidden name, fsynced, and renamed into place.

    checkpoints/step-00001000/
        model.safetensors   weights, by the reference code's names; their moving average where the run keeps one
        trained.safetensors the weights that the optimiser goes on from, only beside such an average
        model.json          how to build the model again
        config.yaml         the resolved config of the command that wrote it
        optimizer.pt        AdamW's state (tensors and numbers only: loads with weights_only=True)
        checkpoint.json     step, identity of the run (the caches' fingerprints are in it), metrics and the means under
                            way, length and xxh3-128 of each file above, and a digest of itself
    checkpoints/best        a link to best-00000800/, a folder like these without the optimiser

`checkpoint.json` is written last: a folder without it, or that does not agree with it, is torn and never loaded. A
sound folder is never written again, and `best` is a link because replacing a link is one rename: no kill loses either.
"""

import contextlib
import errno
import json
import logging
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import xxhash
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from pipeline.config import Config, save_config
from pipeline.errors import CheckpointError, StorageError
from pipeline.files import clean_folder, sync, whole_folder, write_text
from pipeline.tensor_files import save_tensors

log = logging.getLogger(__name__)

_RECORD = "checkpoint.json"
_OF_CONFIG = ("weight_decay", "betas", "lr_scale")  # of a group of the optimiser's; the rate is set before every step


@dataclass(frozen=True)
class Checkpoint:
    """A sound checkpoint on disk, or one that is to be written."""

    path: Path
    step: int
    identity: dict[str, Any]  # what must not change between stop and resume
    metrics: dict[str, Any]
    meter: dict[str, Any] = field(default_factory=dict)  # what was summed up since the last row of metrics

    def optimizer_state(self) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(self.path / "optimizer.pt", map_location="cpu", weights_only=True)
        return state


def save_checkpoint(
    checkpoint: Checkpoint,
    model: nn.Module,
    spec: Mapping[str, Any],
    config: Config | None = None,
    optimizer_state: Mapping[str, Any] | None = None,
    trained: nn.Module | None = None,
) -> None:
    """Write a checkpoint folder atomically. A sound one of the same name stays as it is, a torn one is replaced.

    The caller is the only writer of the folder around it (see `Run`): what killed ones left there is removed.

    Args:
        trained: the model that the optimiser works on, where `model` is its moving average.

    Raises:
        CheckpointError: the disk is full or the folder can't be written; nothing half-written stays.
    """
    path = checkpoint.path
    if _is_sound(path):
        return
    try:
        clean_folder(path.parent)
        with whole_folder(path, durable=True) as partial:
            save_tensors(model.state_dict(), partial / "model.safetensors")
            if trained is not None:
                save_tensors(trained.state_dict(), partial / "trained.safetensors")
            write_text(partial / "model.json", json.dumps(spec, indent=1))
            if config is not None:
                save_config(config, partial / "config.yaml")
            if optimizer_state is not None:
                torch.save(optimizer_state, partial / "optimizer.pt")
            files = {file.name: _fingerprint(file) for file in sorted(partial.iterdir())}
            record = {"step": checkpoint.step, "identity": checkpoint.identity, "metrics": checkpoint.metrics}
            record |= {"meter": checkpoint.meter, "files": files}
            write_text(partial / _RECORD, json.dumps({**record, "digest": _digest(record)}, indent=1))
            shutil.rmtree(path, ignore_errors=True)  # torn: a sound one would have stayed
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk has a name of its own in each library
        raise CheckpointError(
            f"can't write checkpoint {path}: {error}; free some space or choose another output"
        ) from error


def load_checkpoint(path: Path, only: Collection[str] | None = None) -> Checkpoint:
    """Check every byte of a checkpoint folder against its record, or those of the files `only` names.

    Raises:
        CheckpointError: it is torn or no checkpoint.
        StorageError: it can't be read, which says nothing about what it holds.
    """
    try:
        record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
        if record.pop("digest") != _digest(record):
            raise CheckpointError(f"checkpoint {path} is damaged: {_RECORD} is not what was written")
        for name, expected in record["files"].items():
            if (only is None or name in only) and _fingerprint(path / name) != expected:
                raise CheckpointError(f"checkpoint {path} is damaged: {name} is not what was written")
        identity, metrics, meter = (dict(record.get(key, {})) for key in ("identity", "metrics", "meter"))
        return Checkpoint(path, int(record["step"]), identity, metrics, meter)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no complete checkpoint ({error})") from error
    except OSError as error:
        raise StorageError(
            f"checkpoint {path} can't be read ({error.strerror or error}): mend the disk or network and run again, or "
            "move it away to go on from the one before"
        ) from error


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest sound `step-N` checkpoint in a `checkpoints/` folder; torn ones are skipped with a warning."""
    for path in reversed(step_folders(folder)):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            log.warning("skipped: %s", error)
    return None


def recorded_identity(output: Path) -> dict[str, Any]:
    """What the newest checkpoint of the run in `output` says must not change; empty where there is none."""
    newest = _newest_described(output)
    return newest.identity if newest else {}


def recorded_config(output: Path) -> DictConfig | None:
    """The config of the newest checkpoint of the run in `output`; None where there is none."""
    newest = _newest_described(output, only=("config.yaml",))
    return cast(DictConfig, OmegaConf.load(newest.path / "config.yaml")) if newest else None


def _newest_described(output: Path, only: tuple[str, ...] = ()) -> Checkpoint | None:
    """The newest checkpoint whose description, and whose files `only`, are sound."""
    for path in reversed(step_folders(output / "checkpoints")):
        with contextlib.suppress(CheckpointError):  # `newest_checkpoint` says so
            return load_checkpoint(path, only=only)
    return None


def step_folders(folder: Path) -> list[Path]:
    """What a run wrote into its `checkpoints/`, ascending; a `step-00001000-keep` of the user's own is none of it."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


class RecordedStart(NamedTuple):
    """What a run says of the weights that it started from."""

    identity: str  # of these weights
    spec: dict[str, Any]  # of the run's own model, as in model.json


def recorded_start(output: Path, init: Path | None) -> RecordedStart | None:
    """What the run in `output` recorded of its start, if it was started from an `init` of this very name.

    What lies there may have changed since, as a pre-training that went on, or be gone: it plays no part in a run that
    goes on from a checkpoint of its own. Of an `init` of another name only its content can tell whether it is the same.

    Returns:
        None for a run that begins, or has another `init`.
    """
    for path in reversed(step_folders(output / "checkpoints")) if init else ():
        try:
            identity = load_checkpoint(path, only=("config.yaml", "model.json")).identity.get("init")
            config = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"), resolve=False)
            spec = json.loads((path / "model.json").read_text(encoding="utf-8"))
        except (CheckpointError, FileNotFoundError):
            continue  # `newest_checkpoint` says so
        if not identity or not isinstance(config, dict) or config.get("init") != str(init):
            return None
        log.info("init=%s is not read: the run goes on from %s, and started from %s", init, path, identity)
        return RecordedStart(identity, spec)
    return None


def resolve_checkpoint(path: Path) -> Path:
    """What `init` may name: a weights file, a checkpoint folder, or a run folder (its newest sound checkpoint).

    Raises:
        CheckpointError: nothing usable there, or a checkpoint that is not what was written.
    """
    if (path / _RECORD).is_file():
        return load_checkpoint(path).path
    if path.is_file() or (path / "model.safetensors").is_file():
        return path
    newest = newest_checkpoint(path / "checkpoints") if path.is_dir() else None
    if newest is None:
        what = "holds no complete checkpoint" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {what}: give a run folder, a checkpoint folder, a .safetensors or a .pth file")
    return newest.path


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, result: nn.Module) -> None:
    """Load weights, optimiser state and, where `result` is another than `model`, its average: exactly.

    Decay, betas and each layer's share of the rate stay what `optimizer` was built with: they are the config's.
    """
    averaged = result is not model
    weights = "trained.safetensors" if averaged else "model.safetensors"
    model.load_state_dict(load_file(checkpoint.path / weights), strict=True)
    if averaged:
        result.load_state_dict(load_file(checkpoint.path / "model.safetensors"), strict=True)
    of_config = [{key: group[key] for key in _OF_CONFIG if key in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(checkpoint.optimizer_state())
    for group, values in zip(optimizer.param_groups, of_config, strict=True):
        group.update(values)
    log.info("resumed from %s", checkpoint.path)


def best_checkpoint(folder: Path) -> Checkpoint | None:
    """The `best` one of a `checkpoints/` folder; a damaged one counts for nothing, with a warning."""
    best = folder / "best"
    if not best.is_symlink() and not best.exists():
        return None
    try:
        return load_checkpoint(best)
    except CheckpointError as error:
        log.warning("the best is chosen anew from now on: %s", error)
        return None


def make_best(path: Path) -> None:
    """Let `best` beside this sound checkpoint lead to it, in one rename; the former best goes after that.

    Raises:
        CheckpointError: the folder can't be written, or knows no symbolic links.
    """
    best, link = path.with_name("best"), path.with_name(".best.partial")
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        if best.is_dir() and not best.is_symlink():  # a folder, as runs of old have it
            shutil.rmtree(best)
        link.replace(best)
        sync(path.parent)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise CheckpointError(
                f"{best} can't be made: this file system has no symbolic links; choose an output on one that has"
            ) from error
        raise CheckpointError(f"can't link {best} to {path.name}: {error}; choose another output") from error
    for former in path.parent.glob("best-*"):
        if former != path:
            shutil.rmtree(former, ignore_errors=True)


def retire_best(best: Checkpoint) -> None:
    """Give a `best` of steps that will be trained again another name, so that theirs is free; it stays the best."""
    folder = best.path.resolve()
    if not folder.name.endswith("-former"):
        former = folder.with_name(f"best-{best.step:08d}-former")
        folder.rename(former)
        make_best(former)


def prune(folder: Path, keep: int, newest: str) -> None:
    """Of the checkpoints up to `newest`, delete all but the last `keep`, and what killed runs left half-written.

    Later ones than `newest`, which was just written, are torn: they don't count.
    """
    for path in [path for path in step_folders(folder) if path.name <= newest][:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    clean_folder(folder)


def _digest(record: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True).encode())


def _fingerprint(file: Path) -> dict[str, Any]:
    hasher, length = xxhash.xxh3_128(), 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            hasher.update(block)
            length += len(block)
    return {"bytes": length, "xxh3_128": hasher.hexdigest()}


def _is_sound(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        load_checkpoint(path)
    except CheckpointError:
        return False
    return True
