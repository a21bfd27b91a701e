import pytest
import torch
from torch.nn import functional as F

from pipeline.assembly.resizing import resize_attention, resize_tokens


def test_equal_grids_change_nothing() -> None:
    tokens, attention = torch.randn(2, 12, 5), torch.rand(2, 12)
    assert resize_tokens(tokens, (3, 4), (3, 4)) is tokens
    assert resize_attention(attention, (3, 4), (3, 4)) is attention


@pytest.mark.parametrize(("grid", "to"), [((16, 16), (14, 14)), ((4, 4), (8, 8)), ((3, 5), (6, 4))])
def test_tokens_are_resized_as_interpolate_resizes_a_picture(grid: tuple[int, int], to: tuple[int, int]) -> None:
    tokens = torch.randn(2, grid[0] * grid[1], 7)
    pictures = torch.empty(2, 7, *grid)
    for number in range(tokens.shape[1]):
        pictures[:, :, number // grid[1], number % grid[1]] = tokens[:, number]
    expected = F.interpolate(pictures, size=to, mode="bilinear", align_corners=False)
    resized = resize_tokens(tokens, grid, to)
    assert resized.shape == (2, to[0] * to[1], 7)
    for number in range(resized.shape[1]):
        torch.testing.assert_close(resized[:, number], expected[:, :, number // to[1], number % to[1]])


@pytest.mark.parametrize("to", [14, 24])
def test_a_ramp_is_the_same_ramp_on_the_other_grid(to: int) -> None:
    """A cell's value is the position of its centre, in shares of the side; at the border the last centre counts."""
    side = 16
    centres = (torch.arange(side) + 0.5) / side
    ramp = torch.stack(torch.meshgrid(centres, centres, indexing="ij"), -1).flatten(0, 1).unsqueeze(0)
    expected = ((torch.arange(to) + 0.5) / to).clamp(centres[0], centres[-1])
    resized = resize_tokens(ramp, (side, side), (to, to)).unflatten(1, (to, to))[0]
    torch.testing.assert_close(resized[:, 3, 0], expected)
    torch.testing.assert_close(resized[3, :, 1], expected)


def test_attention_is_resized_from_float16_whatever_it_came_in() -> None:
    """Workers hold a cache's float16, a live teacher is on the device: both draw the same masks."""
    attention = torch.rand(3, 36).softmax(1)
    resized = resize_attention(attention, (6, 6), (4, 4))
    assert resized.dtype == torch.float16
    assert torch.equal(resized, resize_attention(attention.half(), (6, 6), (4, 4)))
    expected = F.interpolate(attention.unflatten(1, (6, 6)).unsqueeze(1), (4, 4), mode="bilinear").flatten(1)
    torch.testing.assert_close(resized.float(), expected, rtol=2e-3, atol=0)
