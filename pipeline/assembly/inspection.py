"""What a student makes of images: its input masked and completed, its attention, and its patch features.

`visualize` and the demo draw what these return; nothing here draws.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.configs.data import Focus
from pipeline.data.masks import MaskSampler, visible_count
from pipeline.models import Student, patchify, unpatchify
from pipeline.models.mae import pixel_loss
from pipeline.models.masking import complement, gather_tokens
from pipeline.pixels import denormalise, normalise
from pipeline.teachers import Teacher


class Reconstruction(NamedTuple):
    """Pictures float [N, 3, S, S] in [0, 1], and how far the masked patches are off."""

    masked: Tensor  # grey where the student saw nothing
    completed: Tensor  # its prediction there, and the pixels it was shown
    loss: float  # the pixel loss of training on these masks


class PatchFeatures(NamedTuple):
    """What a network makes of N images, on a grid (h, w) of L cells."""

    tokens: Tensor  # float32 [N, L, D]
    attention: Tensor | None  # float32 [N, L], rows sum to 1
    grid: tuple[int, int]
    name: str
    heads: Tensor | None = None  # float32 [N, H, L], each head's attention, where a cache keeps it


def patch_features(network: Teacher, images: Tensor, name: str) -> PatchFeatures:
    """Show uint8 images [N, 3, S, S] to a teacher, or to a student wrapped as one; the result is on the CPU."""
    output = network(images)
    attention = None if output.attention is None else output.attention.cpu()
    return PatchFeatures(output.tokens.cpu(), attention, network.grid, name)


def choose_patches(
    count: int, patches: int, mask_ratio: float = 0.75, attention: NDArray[np.float32] | None = None,
    focus: Focus = "random", seed: int = 0,
) -> Tensor:  # fmt: skip
    """Visible patches int64 [count, K] as pre-training draws them, by attention rows [count, L] if there are any."""
    keep = visible_count(patches, mask_ratio)
    ids_keep = MaskSampler(patches, keep, focus, seed).draw(attention, [(0, index) for index in range(count)])
    return torch.from_numpy(ids_keep[:, 0])


@torch.inference_mode()
def reconstruct(student: Student, images: Tensor, ids_keep: Tensor) -> Reconstruction:
    """What a student in eval mode makes of uint8 images [N, 3, S, S] from the patches `ids_keep` int64 [N, K] alone."""
    patch = student.encoder.patch_size
    pixels = normalise(images)
    true = patchify(pixels, patch)  # [N, L, p*p*3]
    assert student.decoder is not None  # it predicts pixels
    pred = student.decoder.predict_pixels(student.decoder(student.encoder(pixels, ids_keep).latent, ids_keep))
    hidden = complement(ids_keep, true.shape[1])
    loss = pixel_loss(gather_tokens(pred, hidden), gather_tokens(true, hidden), student.norm_pix_loss)
    if student.norm_pix_loss:
        # Each patch was predicted up to its own mean and deviation: give them back, as MAE's pictures do.
        pred = pred * (true.var(-1, keepdim=True) + 1e-6).sqrt() + true.mean(-1, keepdim=True)
    visible = torch.zeros(true.shape[:2], device=true.device).scatter_(1, ids_keep, 1.0).unsqueeze(-1)  # [N, L, 1]
    masked, completed = (
        denormalise(unpatchify(true * visible + other * (1 - visible), student.grid, patch))
        for other in (torch.zeros_like(true), pred)
    )
    return Reconstruction(masked, completed, float(loss))
