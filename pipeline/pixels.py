"""The students' pixels: uint8 images normalised by ImageNet's mean and deviation, as MAE does it, and back."""

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
