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


class FeatureFiles:
    """Features in `folder`, under names made of their description and of the images' content; safetensors, no pickle.

    Args:
        folder: made when something is written.
        description: all that decides the features beside the images: digest of the weights, split, sizes, ...
    """

    def __init__(self, folder: Path, description: Mapping[str, str]) -> None:
        self._folder = folder
        self._description = {"format": "mrmae-features-2", **description}
        self._name = xxhash.xxh3_128_hexdigest(json.dumps(self._description, sort_keys=True).encode())

    def path(self, content: str) -> Path:
        """The file of the images whose content has this digest."""
        return self._folder / f"{self._name}-{content}.safetensors"

    def any(self) -> bool:
        """Whether there are features of images of whatever content: then it is worth to hash the images."""
        return next(self._folder.glob(f"{self._name}-*.safetensors"), None) is not None

    def read(self, content: str) -> Tensor | None:
        """The features [N,D] float32, or None if there are none; damaged ones count as none, with a warning."""
        path = self.path(content)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                features: Tensor = file.get_tensor("features")
                metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            log.warning("%s can't be read (%s): computing the features again", path, error)
            return None
        if metadata != {**self._description, "content": content, "xxh3_128": _fingerprint(features)}:
            log.warning("%s is not what was written: computing the features again", path)
            return None
        return features

    def write(self, features: Tensor, content: str) -> None:
        """Keep features [N,D] float32: whole or not at all."""
        features = features.contiguous()
        facts = {**self._description, "content": content, "xxh3_128": _fingerprint(features)}
        save_tensors({"features": features}, self.path(content), facts)


def content_digest(hashes: Tensor) -> str:
    """xxh3-128 of the hashes (int64 [N]) of a data set's files, in their order."""
    return xxhash.xxh3_128_hexdigest(hashes.numpy().data)


def _fingerprint(features: Tensor) -> str:
    return f"{list(features.shape)} {xxhash.xxh3_128_hexdigest(features.numpy().data)}"
