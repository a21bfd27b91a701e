"""Label codes, crops, windows of images of any shape, and the score."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import jaccard_score

from pipeline.configs.data import ViewConfig
from pipeline.confusion import confusion_counts
from pipeline.data.views import View, encode_jpeg
from pipeline.errors import DataError
from pipeline.segmentation import (
    LabelCode,
    SceneCrops,
    SceneWindows,
    SegmentationHead,
    class_scores,
    colour_labels,
    label_scene,
    mean_scores,
    segmentation_loss,
)
from pipeline.segmentation.dataset import render_labels
from pipeline.segmentation.head import enlarged_argmax
from pipeline.segmentation.scenes import IGNORED


@dataclass
class Blocks:
    """Scenes whose red channel is the label, in blocks."""

    sizes: list[tuple[int, int]]
    classes: int = 5

    def __len__(self) -> int:
        return len(self.sizes)

    def key(self, index: int) -> str:
        return str(index)

    def label_map(self, index: int) -> NDArray[np.int16]:
        height, width = self.sizes[index]
        rows, columns = np.mgrid[:height, :width]
        return ((rows * 3 // height + columns * 4 // width) % self.classes).astype(np.int16)

    def read(self, index: int) -> bytes:
        grey = (self.label_map(index) * 50).astype(np.uint8)
        return encode_jpeg(np.repeat(grey[..., None], 3, axis=2), 95)


def test_numbers_mean_classes() -> None:
    numbers = np.array([[0, 1, 2], [255, 3, 150]], np.int32)
    plain = LabelCode(151).read(numbers, "a.png")
    assert plain.tolist() == [[0, 1, 2], [IGNORED, 3, 150]]
    assert plain.dtype == np.int16
    ade = LabelCode(150, zero_is_none=True).read(numbers, "a.png")
    assert ade.tolist() == [[IGNORED, 0, 1], [IGNORED, 2, 149]]
    assert LabelCode(151, ignore_index=3).read(numbers % 255, "a").tolist() == [[0, 1, 2], [0, IGNORED, 150]]
    with pytest.raises(DataError, match=r"a\.png holds the number 150: classes are 0 to 149, and 255 is no class"):
        LabelCode(150).read(numbers, "a.png")
    with pytest.raises(DataError, match="holds the number 150: classes are 1 to 149"):
        LabelCode(149, zero_is_none=True).read(numbers, "a.png")
    with pytest.raises(DataError, match="holds the number 255"):
        LabelCode(150, ignore_index=65535).read(numbers, "a.png")


def test_labels_are_cut_as_images_are() -> None:
    """The red channel of a crop says the label at its pixel, up to what resizing mixes at the edges."""
    crops = SceneCrops(Blocks([(60, 90), (200, 50)]), ViewConfig(image_size=48, scale=(0.2, 1.0)))
    batch = crops.__getitems__([(epoch, index) for epoch in range(20) for index in (0, 1)])
    assert (batch.images.shape, batch.labels.shape) == ((40, 3, 48, 48), (40, 48, 48))
    agreement = (batch.images[:, 0].float() / 50).round() == batch.labels
    assert agreement.float().mean() > 0.9
    labels = np.arange(12, dtype=np.int16).reshape(3, 4)
    assert render_labels(labels, View((1, 0, 2, 4), hflip=True), 2).tolist() == [[7, 5], [11, 9]]


@given(st.integers(1, 400), st.integers(1, 400))
@settings(max_examples=40, deadline=None)
def test_windows_cover_images_of_any_shape(height: int, width: int) -> None:
    batch = SceneWindows(Blocks([(height, width)]), 32, 4).__getitems__([(0, 0)])
    (rows, columns), corners = batch.cells[0], batch.corners[0]
    assert min(rows, columns) == 4
    assert max(rows, columns) <= 32
    assert batch.windows.shape == (len(corners), 3, 32, 32)
    covered = np.zeros((rows, columns), int)
    for row, column in corners:
        assert 0 <= row <= rows - 4
        assert 0 <= column <= columns - 4
        covered[row : row + 4, column : column + 4] += 1
    assert covered.min() >= 1
    assert covered.max() <= 4
    assert batch.labels[0].shape == (height, width)
    # A head that reads the mean of each patch: what the windows say together is what the image says.
    patches = batch.windows[:, 0].float().unfold(1, 8, 8).unfold(2, 8, 8).mean((-1, -2))  # [W, 4, 4]
    logits = -(patches[:, None] - 50 * torch.arange(5)[:, None, None]).abs()
    predicted = label_scene(logits, corners, (rows, columns), (height, width))
    assert predicted.shape == (height, width)
    if min(height, width) >= 64 and max(height, width) < 4 * min(height, width):
        assert (predicted == batch.labels[0]).float().mean() > 0.4


def test_overlapping_windows_are_averaged() -> None:
    logits = torch.tensor([[[[0.0, 0.0]], [[1.0, 1.0]]], [[[4.0, 0.0]], [[1.0, 1.0]]]])  # [W=2, C=2, 1, 2]
    labels = label_scene(logits, [(0, 0), (0, 1)], (1, 3), (1, 3))
    assert labels.tolist() == [[1, 0, 1]]  # in the middle class 0 has (0 + 4) / 2


@pytest.mark.parametrize("kind", ["noise", "few win", "equal", "one row", "not a number", "no number at all"])
@pytest.mark.parametrize("size", [(61, 90), (16, 24), (5, 7)])
def test_the_labels_are_those_of_all_maps_enlarged(kind: str, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(40, 8, 12, generator=generator)
    if kind == "few win":
        maps[5:35] -= 20
    elif kind == "equal":
        maps = maps.round()
    elif kind == "one row":
        maps = maps[:, :1]
    elif kind == "not a number":
        maps[3, 2, 4] = torch.nan
    elif kind == "no number at all":
        maps[:] = -torch.inf
    expected = F.interpolate(maps[None], size=size, mode="bilinear")[0].argmax(0)
    assert torch.equal(enlarged_argmax(maps, size), expected)


def test_a_class_that_wins_between_cells_alone_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Second at both ends, first in the middle; and a class that can't win is not enlarged."""
    maps = torch.tensor([[10.0, 0.0], [0.0, 10.0], [9.0, 9.0], [8.0, 8.0]])[:, None]
    enlarged = []
    interpolate = F.interpolate

    def watched(values: torch.Tensor, **options: Any) -> torch.Tensor:
        enlarged.append(values.shape[1])
        return interpolate(values, **options)

    monkeypatch.setattr(F, "interpolate", watched)
    assert enlarged_argmax(maps, (1, 8)).unique().tolist() == [0, 1, 2]
    assert enlarged == [3]


def test_the_head_is_linear_and_its_loss_ignores_pixels_without_a_class() -> None:
    torch.manual_seed(0)
    head = SegmentationHead(6, 3, {}).eval().requires_grad_(False)
    tokens = torch.randn(2, 8, 6)
    logits = head(tokens, (2, 4))
    assert logits.shape == (2, 3, 2, 4)
    torch.testing.assert_close(logits[1, :, 1, 2], head.head(head.norm(tokens[1, 6:7]))[0])
    labels = torch.randint(0, 3, (2, 8, 8), dtype=torch.int16)
    whole = segmentation_loss(logits, labels)
    labels[0] = IGNORED
    assert segmentation_loss(logits, labels) == pytest.approx(float(segmentation_loss(logits[1:], labels[1:])))
    assert whole > 0
    assert segmentation_loss(logits, torch.full_like(labels, IGNORED)) == 0  # and not NaN


def test_scores_are_scikit_learns() -> None:
    """Classes that never occur don't count; pixels without a class don't either."""
    random = np.random.default_rng(0)
    labels = random.integers(-1, 6, (50, 40)).astype(np.int16)
    predicted = np.where(random.random((50, 40)) < 0.5, labels, random.integers(0, 8, (50, 40)))
    predicted[labels == IGNORED] = 9
    counts = confusion_counts(torch.from_numpy(labels), torch.from_numpy(predicted), 10).numpy()
    scored = labels != IGNORED
    each = jaccard_score(labels[scored], predicted[scored], average=None, labels=range(8))
    scores = mean_scores(counts)
    assert scores["mIoU"] == pytest.approx(each.mean())
    assert scores["pixel_accuracy"] == pytest.approx((labels == predicted)[scored].mean())
    classes = class_scores(counts, [f"c{number}" for number in range(10)])
    assert [entry["IoU"] for entry in classes.values()] == pytest.approx(each.tolist())
    assert list(classes) == [f"c{number}" for number in range(8)]
    assert classes["c7"] == {"pixels": 0, "IoU": 0.0}
    assert mean_scores(np.zeros((3, 3), np.int64)) == {"mIoU": 0.0, "pixel_accuracy": 0.0}


def test_classes_have_colours_of_their_own() -> None:
    colours = colour_labels(np.arange(-1, 150, dtype=np.int16)[None])
    assert colours[0, 0].tolist() == [0, 0, 0]
    assert len({tuple(colour) for colour in colours[0].tolist()}) == 151
