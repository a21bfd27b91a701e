import math

import pytest
import torch
from torch import nn

from pipeline.models.patches import conv_in_cells, patchify, sincos_positions, unpatchify


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
