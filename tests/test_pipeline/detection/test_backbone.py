"""Backbones: the maps are the encoder's, the levels lie where the detector expects them."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from pipeline.detection import Backbone
from pipeline.models import Classifier

Build = Callable[..., Classifier]


@pytest.mark.parametrize("image_size", [64, (64, 96)], ids=str)
def test_five_levels_of_one_width(classifier: Build, kind: str, image_size: int) -> None:
    encoder = classifier(kind, image_size).encoder
    backbone = Backbone(encoder, channels=16, window=4, global_blocks=None)
    levels = backbone(torch.randn(2, 3, *encoder.image_size))
    h, w = encoder.grid
    assert list(levels) == ["0", "1", "2", "3", "pool"]
    factors = (4, 2, 1, 1 / 2, 1 / 4)
    assert [tuple(level.shape) for level in levels.values()] == [(2, 16, int(f * h), int(f * w)) for f in factors]


def test_nothing_is_lost_in_the_replumbing(classifier: Build, kind: str) -> None:
    """The map under the pyramid, with windows as large as the image, is what the classifier pools."""
    model = classifier(kind, 64)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tokens = model.encoder.forward_blocks(images)[0][:, model.num_prefix_tokens :]
        backbone = Backbone(model.encoder, channels=16, window=8, global_blocks=())
        last = backbone.encoder.forward_maps(images)[-1].flatten(2).transpose(1, 2)
    assert F.cosine_similarity(tokens, last, dim=-1).min() >= 0.9999
    torch.testing.assert_close(last, tokens, atol=1e-4, rtol=1e-4)


def test_convvit_gives_its_own_maps(classifier: Build) -> None:
    """Stage 1 at four and stage 2 at two cells a side of the last map's, each what the next embedding reads."""
    encoder = classifier("convvit", 64).encoder
    read = {}
    for name in ("patch_embed2", "patch_embed3"):
        encoder.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: read.update({name: x[0]}))
    maps = encoder.forward_maps(torch.randn(1, 3, 64, 64))
    assert [m.shape[1] for m in maps] == list(encoder.map_dims)
    assert [m.shape[2] for m in maps] == [32, 16, 8]
    torch.testing.assert_close(maps[0], read["patch_embed2"])
    torch.testing.assert_close(maps[1], read["patch_embed3"])


def test_every_part_learns(classifier: Build, kind: str) -> None:
    """DDP wants a gradient for each parameter in each step."""
    backbone = Backbone(classifier(kind, 64).encoder, channels=16, window=4, global_blocks=None)
    sum(level.square().mean() for level in backbone(torch.randn(1, 3, 64, 64)).values()).backward()
    assert not [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None]


def test_levels_are_float32_under_autocast(classifier: Build, kind: str) -> None:
    backbone = Backbone(classifier(kind, 64).encoder, channels=16, window=4, global_blocks=None)
    with torch.autocast("cpu", torch.bfloat16):
        levels = backbone(torch.randn(1, 3, 64, 64))
    assert {level.dtype for level in levels.values()} == {torch.float32}
