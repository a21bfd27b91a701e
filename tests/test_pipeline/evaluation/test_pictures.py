"""Pictures: what the colours mean."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.evaluation.pictures import as_maps, draw_grid, head_maps, highlight, overlay, pca_maps


def test_a_colour_means_the_same_feature_in_every_picture() -> None:
    """Two planted directions: the first component sets the halves of picture 0 apart, and picture 1 is all one half."""
    generator = torch.Generator().manual_seed(0)
    tokens = 0.01 * torch.randn(2, 16, 8, generator=generator)
    tokens[0, :8, 0] += 5
    tokens[1, :, 0] += 5
    first, second = pca_maps(tokens, (4, 4))
    assert first.shape == (4, 4, 3)
    bright, dark = first[:2, :, 0], first[2:, :, 0]
    assert abs(float(bright.mean() - dark.mean())) > 0.9
    np.testing.assert_allclose(second[..., 0].mean(), bright.mean(), atol=0.1)
    assert first.min() >= 0
    assert first.max() <= 1


def test_few_tokens_or_channels_still_give_colours() -> None:
    assert pca_maps(torch.randn(1, 4, 2), (2, 2))[0].shape == (2, 2, 3)
    assert np.isfinite(pca_maps(torch.zeros(1, 4, 5), (2, 2))[0]).all()


def test_attention_lights_its_own_cells() -> None:
    attention = torch.full((1, 4), 0.1)
    attention[0, 1] = 0.7  # top right
    (lit,) = overlay([np.full((8, 8, 3), 0.5, np.float32)], as_maps(attention, (2, 2)))
    brightness = lit.sum(-1)
    assert brightness[:4, 4:].min() > 1.5 * brightness[:4, :4].max()
    assert np.ptp(brightness[4:]) < 1e-6


def test_a_highlight_keeps_the_photo_and_dims_what_is_not_attended() -> None:
    """At full size: bright at the attended corner, darker with the distance, the photo's edges everywhere."""
    photo = np.zeros((64, 64, 3), np.float32)
    photo[:, ::2] = 0.8  # stripes of a pixel
    attention = np.zeros((4, 4), np.float32)
    attention[0, 3] = 1.0
    (lit,) = highlight([photo], [attention])
    assert lit.shape == photo.shape
    brightness = lit.mean(-1)[:, ::2]
    assert brightness[4, -4] > 2.5 * brightness[-4, 4]
    assert np.all(np.diff(brightness[8, 16:28]) >= -1e-6)  # no steps between cells
    assert lit[-4, 4, 0] == np.float32(0.8 * 0.25)
    assert lit[-4, 5, 0] == 0


def test_heads_lie_side_by_side_each_with_its_own_maximum() -> None:
    heads = torch.zeros(1, 3, 4)
    for head, (cell, height) in enumerate([(0, 0.5), (3, 0.1), (1, 0.9)]):
        heads[0, head, cell] = height
    (mosaic,) = head_maps(heads, (2, 2))  # two by two maps of two by two cells, the fourth is empty
    expected = np.zeros((4, 4))
    expected[0, 0] = expected[1, 3] = expected[2, 1] = 1
    np.testing.assert_array_equal(mosaic, expected)


def test_a_grid_is_written_with_its_titles(tmp_path: Path) -> None:
    picture = np.zeros((8, 8, 3), np.float32)
    file = draw_grid(tmp_path / "new/grid.png", {"one": [picture, picture], "two": [picture]}, "title", ["a", "b"])
    with Image.open(file) as image:
        assert image.format == "PNG"
        assert min(image.size) > 200
