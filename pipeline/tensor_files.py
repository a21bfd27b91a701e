"""Tensors written to safetensors files: whole or not at all, and readable by whoever may read the files beside them."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a state dict, whatever device and memory order its tensors have.

    Raises:
        OSError, SafetensorError: the disk is full or the folder can't be written; a former file stays as it was.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with usual_mode(partial):
            save_file(plain, partial, metadata=dict(metadata) if metadata else None)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def usual_mode(file: Path) -> Iterator[None]:
    """Give what is written to `file` inside the mode that the umask, or the folder's default ACL, gives a new file.

    safetensors writes a temporary file and renames it; since 0.8 such a file is its owner's alone, whatever the umask.
    """
    file.touch()
    mode = file.stat().st_mode & 0o777
    yield
    file.chmod(mode)
