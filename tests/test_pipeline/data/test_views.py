import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.views import View, ViewConfig, center_view, draw_view, render, view_of_epoch
from tests.pictures import smooth_picture

CONFIG = ViewConfig(image_size=32)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 100), st.floats(0.001, 1.0))
def test_boxes_lie_inside_the_image(height: int, width: int, index: int, view: int, low: float) -> None:
    top, left, h, w = draw_view(CONFIG.model_copy(update={"scale": (low, 1.0)}), index, view, height, width).box
    assert 0 <= top < top + h <= height
    assert 0 <= left < left + w <= width


def test_views_are_a_function_of_seed_index_and_view() -> None:
    views = {
        draw_view(CONFIG.model_copy(update={"seed": seed}), index, view, 300, 400)
        for seed in range(3)
        for index in range(10)
        for view in range(4)
    }
    assert len(views) == 120
    assert draw_view(CONFIG, 5, 1, 300, 400) == draw_view(CONFIG, 5, 1, 300, 400)


def test_views_of_today_are_views_of_tomorrow() -> None:
    """Pinned: another value here means that every cache in the world shows other crops than a new one would."""
    assert draw_view(ViewConfig(), 7, 0, 375, 500) == View((3, 71, 263, 198), False)


def test_area_and_flip_follow_the_policy() -> None:
    views = [draw_view(ViewConfig(scale=(0.2, 1.0)), i, 0, 400, 400) for i in range(4000)]
    areas = np.array([view.box[2] * view.box[3] / 160_000 for view in views])
    assert 0.19 < areas.min() < 0.22
    assert abs(np.mean([view.hflip for view in views]) - 0.5) < 0.03


def test_render_cuts_scales_and_mirrors() -> None:
    image = smooth_picture(0, 50, 60)
    crop = image.crop((7, 3, 27, 33)).resize((32, 32), Image.Resampling.BICUBIC)
    plain, mirrored = (
        np.asarray(render(image, View((3, 7, 30, 20), flip), 32)).transpose(2, 0, 1) for flip in (False, True)
    )
    assert (plain == np.asarray(crop).transpose(2, 0, 1)).all()
    assert (mirrored == plain[:, :, ::-1]).all()
    assert plain.shape == (3, 32, 32)
    assert plain.dtype == np.uint8


@pytest.mark.parametrize(("height", "width", "box"), [(256, 256, (16, 16, 224, 224)), (1, 1, (0, 0, 1, 1))])
def test_center_view(height: int, width: int, box: tuple[int, ...]) -> None:
    assert center_view(height, width).box == box


@pytest.mark.parametrize("views", [1, 2, 3, 4, 8])
def test_every_view_is_shown_once_in_as_many_epochs(views: int) -> None:
    for index in range(50):
        assert {view_of_epoch(index, epoch, views) for epoch in range(5, 5 + views)} == set(range(views))
