"""The students' pixels: uint8 images normalised by ImageNet's mean and deviation, as MAE does it, and back."""

from collections.abc import Sequence

import torch
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_STATISTICS: dict[torch.device, tuple[Tensor, Tensor]] = {}


def normalise(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] → float32, as students take it, in the same memory order."""
    mean, std = _statistics(images.device)
    # One number for every pixel of an image: three alone would make a CPU walk channels-last memory in steps of three.
    every = torch.empty_like(images[:1], dtype=torch.float32)
    return images.float().sub_(every.copy_(mean)).div_(every.copy_(std))


def to_other_pixels(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Scale and shift [3, 1, 1], by which images that `normalise` made have another mean and deviation of 0..1."""
    other_mean, other_std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    own_mean, own_std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return own_std / other_std, (own_mean - other_mean) / other_std


def denormalise(images: Tensor) -> Tensor:
    """The inverse of `normalise`, float32 in [0, 1]."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(1, 3, 1, 1)
    return (images * std + mean).clamp(0, 1)


def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation [1, 3, 1, 1] in 0..255, made once for each device: numbers from the host make it wait."""
    if device in _STATISTICS:
        return _STATISTICS[device]
    with torch.inference_mode(False):  # born in inference mode, they could take no part in training
        mean = torch.tensor(IMAGENET_MEAN, device=device).view(1, 3, 1, 1) * 255
        std = torch.tensor(IMAGENET_STD, device=device).view(1, 3, 1, 1) * 255
    if type(mean) is Tensor:  # not while something is traced or counted without data
        _STATISTICS[device] = mean, std
    return mean, std
