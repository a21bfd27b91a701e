"""Foreign weights in: one reader for `teacher.weights` and `init`, and one digest.

    state = read_state(Path("checkpoint-199.pth"))  # {name: tensor} on the CPU, wrappers and prefixes taken off

A file is what its first bytes say, whatever its ending. Nothing in it is ever run: pickles are opened with
`weights_only=True`, and beside tensors only the harmless classes of `_harmless` are let in.
"""

import argparse
import hashlib
import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import CheckpointError

log = logging.getLogger(__name__)

# Where training codes keep the weights in what they save, in the order in which they are looked for.
WRAPPERS = (
    *("model", "state_dict", "teacher", "student", "module", "model_state_dict"),
    *("ema", "model_ema", "state_dict_ema", "ema_state_dict", "net", "network", "encoder", "target_encoder"),
)
PREFIXES = ("module.", "_orig_mod.", "backbone.")  # of DDP, torch.compile, and DINO's or Lightning's wrappers
_FETCH = "fetch it again"
# Files that are something else than weights, by how they begin, and what helps.
_BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "is a git-lfs pointer", "fetch the file itself with `git lfs pull`, or download it"),
    (b"<!doctype", "is a web page", "download the file again, from the link to the file itself"),
    (b"<html", "is a web page", "download the file again, from the link to the file itself"),
    (b"<?xml", "is an XML answer of a server", "download the file again"),
    (b"\x1f\x8b", "is a gzip archive", "unpack it and give the file inside"),
    (b"\x89hdf", "is a HDF5 file of Keras", "take the model's safetensors or PyTorch file"),
    (b"gguf", "is a GGUF file", "take the model's safetensors or PyTorch file"),
)


def read_state(file: Path) -> dict[str, Tensor]:
    """Read a state dict: a safetensors file, or what `torch.save` wrote.

    The first of `WRAPPERS` that holds tensors is opened, as often as there is one. `PREFIXES` are taken off, and
    beside a `backbone.` all else (a method's heads) is left away. What isn't a tensor is left away, too.

    Raises:
        CheckpointError: one line with what the file is instead, or which object in it would run code, and a remedy.
    """
    return plain_names(load_tensors(file))


def load_tensors(file: Path) -> dict[str, Tensor]:
    """As `read_state`, with the names that the file has below its wrappers: for our own files.

    Raises:
        CheckpointError: as `read_state`.
    """
    state = _unwrap(_load(file), file)
    if not state:
        raise CheckpointError(f"{file} holds no tensors: is it a model's checkpoint?")
    return state


def state_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes in the order of the names, so that no file format shows."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def misfit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """What keeps a state dict from fitting a model whose tensors are `expected`, in one line; empty if it fits."""
    reshaped = [
        f"{key} {list(value.shape)} for {list(expected[key].shape)}"
        for key, value in state.items()
        if key in expected and value.shape != expected[key].shape
    ]
    problems = {
        "missing": [key for key in expected if key not in state],
        "extra": [key for key in state if key not in expected],
        "of another shape": reshaped,
    }
    return "; ".join(f"{label}: {_first(names)}" for label, names in problems.items() if names)


def _first(names: list[str], shown: int = 6) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the model's own names; of a method that keeps its ViT in `backbone.`, those below it alone."""
    plain, backbone = dict[str, Tensor](), dict[str, Tensor]()
    for key, value in state.items():
        name, below = key, False
        while found := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
            name, below = name.removeprefix(found), below or found == "backbone."
        (backbone if below else plain)[name] = value
    return backbone or plain


def _load(file: Path) -> object:
    """Whatever the file holds, by its kind."""
    if file.is_dir():
        raise CheckpointError(f"{file} is a folder: give the weights file in it")
    try:
        with file.open("rb") as stream:
            head = stream.read(512)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file}: no such file; give a .safetensors, or what torch.save wrote (.pth, .pt, .bin, .ckpt)"
        ) from error
    except OSError as error:
        raise _unreadable(file, error) from error
    _check_kind(file, head)
    try:
        if head[8:9] == b"{":  # eight bytes of length, then JSON
            return load_file(file)
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if objects := _objects(error):
            raise CheckpointError(
                f"{file} holds more than tensors and is refused, for opening {objects} would run code: where you trust "
                "the file, load it and save its state dict alone, as .safetensors"
            ) from error
        raise CheckpointError(f"{file} is torn, or no file of weights: {_FETCH}") from error
    except OSError as error:
        raise _unreadable(file, error) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, TypeError) as error:
        log.debug("%s", file, exc_info=True)
        raise CheckpointError(f"{file} is torn: it ends early, or bytes in it are damaged; {_FETCH}") from error


def _unreadable(file: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{file} can't be read ({error.strerror or error}): check the disk and its rights")


def _check_kind(file: Path, head: bytes) -> None:
    """Name what is no weights at all.

    Raises:
        CheckpointError: an empty file, a pointer, a page, an archive, a program.
    """
    beginning = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise CheckpointError(f"{file} is empty: {_FETCH}")
    for start, kind, remedy in _BEGINNINGS:
        if beginning.startswith(start):
            raise CheckpointError(f"{file} {kind} and holds no weights: {remedy}")
    if beginning.startswith((b"{", b"[")):
        raise CheckpointError(f"{file} is JSON text and holds no weights: give the weights file that lies beside it")
    if head.startswith(b"PK") and zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            raise CheckpointError(
                f"{file} is a TorchScript program, as OpenAI's original CLIP files are, and is never run: take the "
                "model's safetensors file (docs/teachers.md), or save torch.jit.load(FILE).state_dict() yourself"
            )
        if not any(name.endswith("data.pkl") for name in names):
            raise CheckpointError(f"{file} is a zip archive without PyTorch weights: unpack it, or take another file")


def _harmless() -> list[Any]:
    """Classes that training codes save beside the weights, and that only hold values: arguments, numpy's numbers."""
    from numpy._core import multiarray

    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdg"}  # no objects: these could hold anything
    pairs = [
        (getattr(multiarray, name), f"numpy.{core}.multiarray.{name}")
        for name in ("scalar", "_reconstruct")
        for core in ("core", "_core")
    ]
    return [argparse.Namespace, np.dtype, np.ndarray, *kinds, *pairs]


def _objects(error: pickle.UnpicklingError) -> str:
    """The names of the classes that torch refused, or nothing when the pickle itself is broken."""
    names = re.findall(r"GLOBAL ([\w.]+)|class (?:to be )?([\w.]+\.[\w.]+)", str(error))
    return ", ".join(sorted({first or second for first, second in names}))


def _unwrap(loaded: object, file: Path) -> dict[str, Tensor]:
    """The dict of tensors inside a checkpoint."""
    while isinstance(loaded, Mapping):
        inner = [key for key in WRAPPERS if _holds_tensors(loaded.get(key))]
        if not inner:
            break
        unused = [str(key) for key in loaded if key != inner[0] and _holds_tensors(loaded[key])]
        if unused:
            log.warning("%s: taking the weights of '%s'; it also holds those of %s", file, inner[0], ", ".join(unused))
        loaded = loaded[inner[0]]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{file} holds no tensors by name but a {type(loaded).__name__}: save its state dict")
    state = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if not state and loaded:
        keys = ", ".join(f"'{key}'" for key in list(loaded)[:8]) + (", ..." if len(loaded) > 8 else "")
        raise CheckpointError(f"{file} holds no tensors by name, but {keys}: save the weights alone, as .safetensors")
    return state


def _holds_tensors(value: object) -> bool:
    """Whether a state dict lies in it, or below it."""
    if not isinstance(value, Mapping):
        return False
    return any(isinstance(inner, Tensor) for inner in value.values()) or any(
        _holds_tensors(value.get(key)) for key in WRAPPERS
    )
