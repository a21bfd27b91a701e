"""Windows: one over the whole image is plain attention; smaller ones see themselves, CLS, nothing beyond the edge."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.detection.windows import Windows, attend_in_windows, quarter_ends
from pipeline.errors import ConfigError
from pipeline.models import Classifier, build_classifier

Build = Callable[..., Classifier]


def windowed(model: Classifier, window: int, global_blocks: tuple[int, ...] = ()) -> Classifier:
    """A copy whose blocks attend in windows."""
    copy = deepcopy(model)
    encoder = copy.encoder
    attend_in_windows(
        encoder.blocks,
        encoder.grid,
        prefix=encoder.num_prefix_tokens,
        window=window,
        global_blocks=global_blocks,
    )
    return copy


def tokens(model: Classifier, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.encoder.forward_blocks(images)[0]


@pytest.mark.parametrize("image_size", [64, (64, 48)], ids=str)
@pytest.mark.parametrize("window", [8, 11], ids=["exact", "larger"])
def test_windows_as_large_as_the_image_change_nothing(
    classifier: Build, kind: str, image_size: int, window: int
) -> None:
    """In no block global: what is compared is the windowed path, CLS token and padding included."""
    model = classifier(kind, image_size)
    images = torch.randn(2, 3, *model.image_size)
    plain, cut = tokens(model, images), tokens(windowed(model, window), images)
    assert F.cosine_similarity(plain, cut, dim=-1).min() >= 0.9999
    torch.testing.assert_close(cut, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mrmae_vit_base_patch16", "mrmae_convvit_base_patch16"])
def test_the_same_at_base_size(name: str) -> None:
    model = build_classifier(name, 10, image_size=224, depth=3).eval()
    images = torch.randn(1, 3, 224, 224)
    plain, cut = tokens(model, images), tokens(windowed(model, 14), images)
    assert F.cosine_similarity(plain, cut, dim=-1).min() >= 0.9999


def test_smaller_windows_do_change_it(classifier: Build, kind: str) -> None:
    model = classifier(kind, 64)
    images = torch.randn(2, 3, 64, 64)
    assert not torch.allclose(tokens(model, images), tokens(windowed(model, 4), images), atol=1e-3)


def test_names_of_weights_stay(classifier: Build, kind: str) -> None:
    model = classifier(kind, 64)
    assert windowed(model, 4).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("window", [3, 4, 5])
def test_a_window_sees_only_itself(window: int) -> None:
    """Attention that averages its keys: each cell becomes the mean of its window's cells inside the grid."""
    grid, prefix = (8, 7), 0
    x = torch.randn(2, 56, 5)
    mean = averaged(Windows(grid, window, prefix), x).reshape(2, *grid, 5)
    cells = x.reshape(2, *grid, 5)
    for top in range(0, 8, window):
        for left in range(0, 7, window):
            there = (slice(None), slice(top, top + window), slice(left, left + window))
            expected = cells[there].mean((1, 2), keepdim=True).expand_as(cells[there])
            torch.testing.assert_close(mean[there], expected)


def test_the_class_token_takes_part_in_every_window_and_is_their_mean() -> None:
    x = torch.randn(1, 1 + 16, 5)
    out = averaged(Windows((4, 4), 2, 1), x)
    windows = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    means = torch.stack([x[0, [0, *(1 + cell for cell in window)]].mean(0) for window in windows])
    torch.testing.assert_close(out[0, 0], means.mean(0))
    torch.testing.assert_close(out[0, 1 + 2], means[1])  # cell 2 lies in the second window


def averaged(windows: Windows, x: Tensor) -> Tensor:
    """Stand-in for attention with equal weights."""
    (inside,), options = windows.cut(torch.nn.Identity(), (x,), {"attn_mask": None})
    mask = options["attn_mask"]
    weights = torch.ones(len(inside), 1, 1, inside.shape[1]) if mask is None else mask.float()
    mean = (weights.squeeze(1) @ inside) / weights.squeeze(1).sum(-1, keepdim=True)
    return windows.join(torch.nn.Identity(), (), mean.expand_as(inside))


@pytest.mark.parametrize(
    ("depth", "ends"), [(12, (2, 5, 8, 11)), (11, (2, 5, 8, 10)), (24, (5, 11, 17, 23)), (2, (0, 1))]
)
def test_the_ends_of_the_quarters(depth: int, ends: tuple[int, ...]) -> None:
    assert quarter_ends(depth) == ends


def test_blocks_that_are_not_there(classifier: Build) -> None:
    with pytest.raises(ConfigError, match=r"global_blocks=\[4\]: name blocks from 0 to 3"):
        windowed(classifier("vit", 64), 4, global_blocks=(4,))


def test_gradients_under_checkpointing(classifier: Build, kind: str) -> None:
    plain, saving = (classifier(kind, 64, gradient_checkpointing=flag).train() for flag in (False, True))
    saving.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 64, 64)
    gradients = []
    for model in (windowed(plain, 3), windowed(saving, 3)):
        model.encoder.forward_blocks(images)[0].square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.encoder.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1])
