import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.models.patches import conv_in_cells, patchify, resample_positions, sincos_positions, unpatchify


def test_a_patch_is_rows_of_columns_of_channels() -> None:
    images = torch.randn(2, 3, 12, 20)
    patches = patchify(images, 4)
    assert patches.shape == (2, 15, 48)
    third_row = images[1, :, 8:12, 4:8]  # cell 11 of the 3 × 5 grid: row 2, column 1
    assert torch.equal(patches[1, 11].view(4, 4, 3), third_row.permute(1, 2, 0))


def test_unpatchify_undoes_patchify() -> None:
    images = torch.randn(2, 3, 12, 20)
    assert torch.equal(unpatchify(patchify(images, 4), (3, 5), 4), images)


@pytest.mark.parametrize("stride", [2, 4])
def test_convolution_in_cells_equals_the_one_on_the_map(stride: int) -> None:
    images, conv = torch.randn(2, 3, 12, 20), nn.Conv2d(3, 8, stride, stride)
    inside = conv_in_cells(patchify(images, 4).view(2, 15, 16, 3), conv)  # [2, 15, (4/s)^2, 8]
    fine = 4 // stride
    on_map = patchify(conv(images), fine).view(2, 15, fine * fine, 8)
    torch.testing.assert_close(inside, on_map)


def test_positions_code_the_column_first_then_the_row() -> None:
    table = sincos_positions(16, (3, 5), prefix=1)
    assert table.shape == (1, 16, 16)
    assert not table[0, 0].any()
    row, column = 2, 3
    at = table[0, 1 + row * 5 + column]
    omega = 10000 ** (-1 / 4)  # the second of four frequencies
    expected = [math.sin(column * omega), math.cos(column * omega), math.sin(row * omega), math.cos(row * omega)]
    torch.testing.assert_close(at[1::4], torch.tensor(expected))


def test_resampling_to_the_same_grid_changes_nothing() -> None:
    positions = torch.randn(1, 1 + 12, 8)
    torch.testing.assert_close(resample_positions(positions, (3, 4), (3, 4), prefix=1), positions)


def test_resampling_is_bicubic_and_keeps_the_prefix() -> None:
    positions = torch.randn(1, 1 + 12, 8)
    larger = resample_positions(positions, (3, 4), (6, 5), prefix=1)
    assert torch.equal(larger[:, :1], positions[:, :1])
    image = positions[0, 1:].T.reshape(1, 8, 3, 4)
    expected = F.interpolate(image, (6, 5), mode="bicubic", align_corners=False).flatten(2)[0].T
    torch.testing.assert_close(larger[0, 1:], expected)
