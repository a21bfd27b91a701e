import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.configs.data import ViewConfig
from pipeline.data.views import Picture, View, center_view, draw_view, render, render_torch, view_of_epoch
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


def torch_bytes() -> str:
    """A digest of views that torch renders of noise and of a smooth picture: enlarged, reduced, odd, mirrored, tiny."""
    digest = hashlib.sha256()
    noise = np.random.default_rng(0).integers(0, 256, (301, 187, 3), np.uint8)
    smooth = np.array(smooth_picture(1, 301, 187))
    boxes = [(0, 0, 301, 187), (3, 7, 30, 20), (101, 50, 33, 97), (300, 186, 1, 1), (0, 0, 1, 187), (20, 3, 224, 180)]
    for number, box in enumerate(boxes):
        for pixels in (noise, smooth):
            for size in (32, 224):
                out = np.empty((size, size, 3), np.uint8)
                render_torch(pixels, View(box, bool(number % 2)), out)
                digest.update(out)
    return digest.hexdigest()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_views_by_torch_are_the_same_on_a_cpu_without_vector_units(capability: str) -> None:
    """A cache is made on one machine and trained from on another."""
    code = "from tests.test_pipeline.data.test_views import torch_bytes; print(torch_bytes())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], env=environment, capture_output=True, check=True
    )
    assert done.stdout.decode().strip() == torch_bytes()


def test_torch_renders_what_pillow_does_but_for_a_few_grey_levels() -> None:
    image = smooth_picture(0, 150, 170)
    for flip in (False, True):
        view = View((3, 7, 130, 120), flip)
        out = np.empty((96, 96, 3), np.uint8)
        render_torch(np.array(image), view, out)
        apart = np.abs(out.astype(int) - np.asarray(render(image, view, 96)).astype(int))
        assert apart.max() <= 2
        assert apart.mean() < 0.1


def test_pillow_goes_without_saying() -> None:
    """Headers of caches and identities of runs from before there was a choice name no interpolation."""
    assert ViewConfig().model_dump(mode="json") == {
        "count": 1, "image_size": 224, "scale": [0.2, 1.0], "ratio": [0.75, 4 / 3], "hflip": 0.5, "seed": 0,
    }  # fmt: skip
    assert ViewConfig.model_validate(ViewConfig().model_dump()).interpolation == "pillow"
    torch = ViewConfig(interpolation="torch")
    assert torch.model_dump()["interpolation"] == "torch"
    assert ViewConfig.model_validate(torch.model_dump()) == torch


def test_a_picture_is_shown_by_the_policy(tmp_path: Path) -> None:
    smooth_picture(0, 50, 60).save(tmp_path / "a.png")
    shown = {}
    for interpolation in ("pillow", "torch"):
        picture = Picture((tmp_path / "a.png").read_bytes(), ViewConfig(image_size=32, interpolation=interpolation))
        assert (picture.height, picture.width) == (50, 60)
        shown[interpolation] = np.empty((32, 32, 3), np.uint8)
        picture.show(View((3, 7, 30, 20), True), shown[interpolation])
    image = smooth_picture(0, 50, 60)
    by_torch = np.empty((32, 32, 3), np.uint8)
    render_torch(np.array(image), View((3, 7, 30, 20), True), by_torch)
    assert (shown["pillow"] == np.asarray(render(image, View((3, 7, 30, 20), True), 32))).all()
    assert (shown["torch"] == by_torch).all()
