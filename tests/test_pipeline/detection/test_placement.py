"""Pixels, boxes and masks follow one placement; large-scale jitter is a function of (seed, index, epoch)."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.configs.detection import JitterConfig
from pipeline.detection.coco import Instances
from pipeline.detection.placement import FILL, Placement, fit, place, render, sample_placement
from tests.coco import HEIGHT, WIDTH, compressed, polygon, uncompressed

BOX = (20, 10, 50, 44)  # left, top, width, height of a white rectangle on black
CANVAS = 64
FORMS = {"polygon": polygon, "rle": compressed, "uncompressed rle": uncompressed}


@pytest.fixture
def image() -> Image.Image:
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[10:54, 20:70] = 255
    return Image.fromarray(pixels)


def instances(form: str = "polygon", box: tuple[int, int, int, int] = BOX) -> Instances:
    x, y, w, h = box
    return Instances(np.array([[x, y, x + w, y + h]], float), np.array([5]), [FORMS[form](*box)])


def white(canvas: NDArray[np.uint8], placement: Placement) -> NDArray[np.bool_]:
    h, w = placement.size
    inside = np.zeros(canvas.shape[1:], bool)
    inside[:h, :w] = (canvas[:, :h, :w] > 127).all(0)
    return inside


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("scale", [0.4, 1.0, 1.7, 2.0])
def test_boxes_and_masks_lie_where_the_pixels_do(image: Image.Image, form: str, hflip: bool, scale: float) -> None:
    config = JitterConfig(scale=(scale, scale), hflip=float(hflip))
    for index in range(4):
        placement = sample_placement(config, 3, index, 0, (HEIGHT, WIDTH), CANVAS)
        seen = white(render(image, placement, CANVAS), placement)
        boxes, labels, masks = place(instances(form), placement, CANVAS, height=HEIGHT, width=WIDTH)
        assert masks.shape == (1, CANVAS, CANVAS)
        assert labels.tolist() == [5]
        union = (masks[0] > 0) | seen
        assert ((masks[0] > 0) & seen).sum() / union.sum() > 0.9  # the border may fall on either side
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        expected = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert boxes[0] == pytest.approx(expected, abs=1.01)


def test_evaluation_fits_the_longer_side(image: Image.Image) -> None:
    placement = fit(HEIGHT, WIDTH, 48)
    assert placement == Placement((32, 48), (0, 0), (32, 48), hflip=False)
    canvas = render(image, placement, 48)
    assert canvas.shape == (3, 48, 48)
    assert (canvas[:, 32:] == np.array(FILL).reshape(3, 1, 1)).all()
    assert (canvas[:, 10:20, 15:30] == 255).all()


def test_the_range_of_the_jitter() -> None:
    config = JitterConfig()
    drawn = [sample_placement(config, 0, i, 0, (480, 640), 1024) for i in range(500)]
    scales = np.array([max(p.scaled) / 1024 for p in drawn])
    assert 0.1 <= scales.min() < 0.15
    assert 1.95 < scales.max() <= 2.0
    assert np.mean([p.hflip for p in drawn]) == pytest.approx(0.5, abs=0.08)
    assert all(max(p.size) <= 1024 for p in drawn)
    assert all(o + s <= whole for p in drawn for o, s, whole in zip(p.offset, p.size, p.scaled, strict=True))
    offsets = np.array([p.offset[1] / (p.scaled[1] - 1024) for p in drawn if p.scaled[1] > 1100])
    assert 0 <= offsets.min() < 0.1
    assert 0.9 < offsets.max() <= 1


def test_the_jitter_depends_on_seed_sample_and_epoch_alone() -> None:
    def draw(seed: int, index: int, epoch: int) -> Placement:
        return sample_placement(JitterConfig(), seed, index, epoch, (480, 640), 512)

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(1, 2, 3), draw(0, 2, 3), draw(1, 0, 3), draw(1, 2, 0)}) == 4


def test_an_object_that_the_crop_leaves_out_is_gone() -> None:
    placement = Placement((2 * HEIGHT, 2 * WIDTH), (0, 0), (64, 64), hflip=False)
    boxes, labels, masks = place(instances(box=(60, 40, 20, 20)), placement, CANVAS, height=HEIGHT, width=WIDTH)
    assert boxes.shape == (0, 4)
    assert labels.shape == (0,)
    assert masks.shape == (0, CANVAS, CANVAS)


def test_a_cut_box_shrinks_to_what_is_left_of_its_mask() -> None:
    """An L whose foot lies outside the crop: only its stem is left, which is narrower than the box."""
    segment = [[10, 0, 20, 0, 20, 40, 60, 40, 60, 50, 10, 50]]
    one = Instances(np.array([[10, 0, 60, 50]], float), np.array([1]), [segment])
    boxes, _, _ = place(one, Placement((64, 96), (0, 0), (32, 64), hflip=False), CANVAS, height=64, width=96)
    assert boxes[0] == pytest.approx([10, 0, 20, 32], abs=1)


def test_an_image_without_objects() -> None:
    nothing = Instances(np.zeros((0, 4)), np.zeros(0, np.int64), [])
    boxes, labels, masks = place(nothing, fit(HEIGHT, WIDTH, CANVAS), CANVAS, height=HEIGHT, width=WIDTH)
    assert (boxes.shape, labels.shape, masks.shape) == ((0, 4), (0,), (0, CANVAS, CANVAS))


def test_a_range_upside_down() -> None:
    with pytest.raises(ValueError, match="needs 0 < low <= high"):
        JitterConfig(scale=(2.0, 0.1))
