"""How a batch size is found where none is given."""

import pytest

from pipeline.steps import fit_batch_size


@pytest.mark.parametrize(
    ("images", "unit", "expected"),
    [
        (1_281_167, 2, 1024),
        (8192, 2, 1024),
        (8191, 2, 512),
        (300, 2, 32),  # 9 steps
        (20, 2, 2),
        (3, 2, 2),  # no size leaves 8 steps: the smallest
        (8192, 6, 1020),  # three processes
        (300, 48, 48),
    ],
)
def test_eight_steps_an_epoch_where_the_images_allow_it(images: int, unit: int, expected: int) -> None:
    assert fit_batch_size(images, unit) == expected


def test_the_batch_counts_masks() -> None:
    assert fit_batch_size(300, 8, per_image=4) == 128  # 32 images
    assert fit_batch_size(300, 2, largest=16) == 16
