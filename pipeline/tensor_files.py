"""Tensors in safetensors files."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from pipeline.files import remove_dead_partials, whole_file


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a state dict whole or not at all, whatever device and memory order its tensors have.

    Raises:
        OSError, SafetensorError: the disk is full or the folder can't be written; a former file stays as it was.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    remove_dead_partials(file)
    with whole_file(file) as partial:
        save_file(plain, partial, metadata=dict(metadata) if metadata else None)
