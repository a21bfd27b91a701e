"""Reconstructions: what is shown is what the student was given and what it predicted."""

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.assembly.inspection import choose_patches, patch_features, reconstruct
from pipeline.models import Student, build_student, patchify
from pipeline.teachers import build_teacher

MICRO = {"image_size": 32, "patch_size": 8, "dim": 48, "depth": 1, "num_heads": 3}
DECODER = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}


def student(name: str = "mrmae_vit_tiny_patch16", **changes: object) -> Student:
    torch.manual_seed(0)
    model: Student = build_student(name, **{**MICRO, **DECODER, "objective": "mae", **changes})  # type: ignore[arg-type]
    return model.eval()


class Knows(nn.Module):
    """In place of the last layer: the answer."""

    def __init__(self, answer: torch.Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.answer


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("name", ["mrmae_vit_tiny_patch16", "mrmae_convvit_small_patch16"])
def test_a_student_that_knows_the_answer_gives_the_image_back(name: str, norm_pix_loss: bool) -> None:
    from pipeline.pixels import normalise

    model = student(name, norm_pix_loss=norm_pix_loss)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    answer = patchify(normalise(images), 8)
    if norm_pix_loss:
        answer = (answer - answer.mean(-1, keepdim=True)) / (answer.var(-1, keepdim=True) + 1e-6).sqrt()
    model.decoder.decoder_pred = Knows(answer)
    seen = reconstruct(model, images, choose_patches(2, 16))
    torch.testing.assert_close(seen.completed, images / 255, atol=1e-5, rtol=0)
    assert seen.loss < 1e-9


def test_visible_patches_are_shown_and_masked_ones_are_not() -> None:
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    ids = torch.tensor([[0, 5]])
    seen = reconstruct(student(), images, ids)
    true = patchify(images / 255, 8)
    masked, completed = patchify(seen.masked, 8), patchify(seen.completed, 8)
    for pictures in (masked, completed):
        torch.testing.assert_close(pictures[:, ids[0]], true[:, ids[0]], atol=1e-5, rtol=0)
    assert float(masked[:, [1, 2, 3, 4, *range(6, 16)]].std(1).max()) < 1e-6  # one grey
    assert not torch.allclose(completed[:, 1], true[:, 1], atol=1e-2)


def test_patches_follow_the_attention_or_the_seed() -> None:
    attention = np.tile(np.linspace(0, 1, 16, dtype=np.float32), (3, 1))
    assert choose_patches(3, 16, 0.75, attention, "top-k").tolist() == [[12, 13, 14, 15]] * 3
    random = choose_patches(3, 16)
    assert random.shape == (3, 4)
    assert torch.equal(random, choose_patches(3, 16))
    assert not torch.equal(random, choose_patches(3, 16, seed=1))


def test_a_student_is_looked_through_like_a_teacher() -> None:
    model = student()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    features = patch_features(build_teacher("mrmae:x", module=model.encoder), images, "name")
    assert (features.tokens.shape, features.grid, features.name) == ((2, 16, 48), (4, 4), "name")
    assert features.attention is not None
    torch.testing.assert_close(features.attention.sum(1), torch.ones(2))
