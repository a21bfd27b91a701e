"""Tensors in safetensors files."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pipeline.files import remove_dead_partials, whole_file


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a state dict whole or not at all, whatever device and memory order its tensors have.

    Raises:
        OSError: the disk is full, fails, or the folder can't be written; a former file stays as it was.
        SafetensorError: the tensors can't be written as such.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    remove_dead_partials(file)
    with whole_file(file) as partial:
        try:
            save_file(plain, partial, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:
            number = re.search(r"\(os error (\d+)\)", str(error))  # the library tells what the disk said in its text
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error
