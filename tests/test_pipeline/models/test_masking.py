import torch

from pipeline.models.masking import complement, gather_tokens, restore, scatter_tokens, visible_map, visible_pixels


def draw(batch: int = 4, length: int = 15, keep: int = 6) -> torch.Tensor:
    return torch.rand(batch, length).argsort(1)[:, :keep]


def test_complement_is_the_other_cells_in_ascending_order() -> None:
    ids = draw()
    for kept, masked in zip(ids.tolist(), complement(ids, 15).tolist(), strict=True):
        assert masked == sorted(set(range(15)) - set(kept))


def test_gather_takes_each_samples_own_rows() -> None:
    ids, tokens = draw(), torch.randn(4, 16, 7)[:, 1:]  # a part of something, as patches behind a class token are
    expected = torch.stack([own[rows] for own, rows in zip(tokens, ids, strict=True)])
    assert torch.equal(gather_tokens(tokens, ids), expected)


def test_scatter_undoes_gather_and_leaves_zeros() -> None:
    ids, tokens = draw(), torch.randn(4, 15, 7)
    back = scatter_tokens(gather_tokens(tokens, ids), ids, 15)
    assert torch.equal(gather_tokens(back, ids), gather_tokens(tokens, ids))
    assert not gather_tokens(back, complement(ids, 15)).any()


def test_restore_puts_the_mask_token_at_masked_cells_alone() -> None:
    ids, tokens, fill = draw(), torch.randn(4, 6, 7), torch.randn(1, 1, 7)
    full = restore(tokens, ids, 15, fill)
    assert torch.equal(gather_tokens(full, ids), tokens)
    assert torch.equal(gather_tokens(full, complement(ids, 15)), fill.expand(4, 9, 7))


def test_map_and_pixels_agree_on_what_is_visible() -> None:
    ids, grid, factor = draw(), (3, 5), 4
    visible = visible_map(ids, grid, factor)
    assert visible.shape == (4, 1, 12, 20)
    assert visible.sum((1, 2, 3)).tolist() == [6 * 16] * 4
    pixels = visible_pixels(ids, grid, factor)
    assert visible.flatten(1).gather(1, pixels).all()
    assert all(len(set(row)) == 6 * 16 for row in pixels.tolist())


def test_pixels_run_cell_by_cell_and_row_by_row() -> None:
    pixels = visible_pixels(torch.tensor([[4, 0]]), (2, 3), 2)  # cell 4 is row 1, column 1; the map is 4 × 6
    assert pixels.tolist() == [[14, 15, 20, 21, 0, 1, 6, 7]]
