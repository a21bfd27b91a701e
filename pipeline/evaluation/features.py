"""Frozen features of a whole data set, once, for whatever is then measured on them."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pipeline.errors import DataError


def extract_features(
    encode: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode every batch without gradients and gather the features on the CPU.

    Args:
        encode: images as the batches hold them → features [B,D] on any device; it moves and normalises the images.
        batches: (images, labels [B]) pairs, in the order that the features shall have.
        progress: told the number of samples done, after each batch.

    Returns:
        features [N,D] float32 and labels [N] int64, both on the CPU.

    Raises:
        DataError: no batch came.
    """
    features: list[Tensor] = []
    labels: list[Tensor] = []
    done = 0
    for images, batch_labels in batches:
        with torch.inference_mode():
            features.append(encode(images).float().cpu())
        labels.append(batch_labels.long().cpu())
        done += len(batch_labels)
        if progress is not None:
            progress(done)
    if not features:
        raise DataError("there are no images to take features of: check the data set and its split")
    # Joined out here: tensors born in inference mode could take no part in training.
    return torch.cat(features), torch.cat(labels)
