"""Frozen features of a data set, computed once for all that is measured on them, and kept in a file if wanted."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import DataError
from pipeline.tensor_files import save_tensors

log = logging.getLogger(__name__)


class FeatureSets(NamedTuple):
    """Features [N, D] and labels int64 [N] to learn from, and those to be classified; labels are below num_classes."""

    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    num_classes: int


def extract_features(
    encode: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Encode every batch without gradients and gather the features on the CPU.

    Args:
        encode: images as the batches hold them → features [B,D] on any device; it moves and normalises the images.
        batches: (images, labels [B]) pairs, in the order that the features shall have.

    Returns:
        features [N,D] float32 and labels [N] int64, both on the CPU.

    Raises:
        DataError: no batch came.
    """
    features: list[Tensor] = []
    labels: list[Tensor] = []
    for images, batch_labels in batches:
        with torch.inference_mode():
            features.append(encode(images).float().cpu())
        labels.append(batch_labels.long().cpu())
    if not features:
        raise DataError("there are no images to take features of: check the data set and its split")
    # Joined outside of inference mode: its tensors could take no part in training.
    return torch.cat(features), torch.cat(labels)


class FeatureFile:
    """Features in `folder`, under a name made of their description; safetensors, so no pickle.

    Args:
        folder: made when something is written.
        description: all that decides the features: digests of the weights and of the data, sizes, ...
    """

    def __init__(self, folder: Path, description: Mapping[str, str]) -> None:
        self._description = {"format": "mrmae-features-1", **description}
        name = xxhash.xxh3_128_hexdigest(json.dumps(self._description, sort_keys=True).encode())
        self.path = folder / f"{name}.safetensors"

    def read(self) -> Tensor | None:
        """The features [N,D] float32, or None if there are none; damaged ones count as none, with a warning."""
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                features: Tensor = file.get_tensor("features")
                metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            log.warning("%s can't be read (%s): computing the features again", self.path, error)
            return None
        if metadata != {**self._description, "xxh3_128": _fingerprint(features)}:
            log.warning("%s is not what was written: computing the features again", self.path)
            return None
        return features

    def write(self, features: Tensor) -> None:
        """Keep features [N,D] float32: whole or not at all."""
        features = features.contiguous()
        save_tensors({"features": features}, self.path, {**self._description, "xxh3_128": _fingerprint(features)})


def _fingerprint(features: Tensor) -> str:
    return f"{list(features.shape)} {xxhash.xxh3_128_hexdigest(features.numpy().data)}"
