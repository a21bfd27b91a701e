"""Batches of scenes: random crops by (seed, epoch, index) alone for training, overlapping windows for evaluation."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.configs.data import ViewConfig
from pipeline.data.loader import Request
from pipeline.data.slots import Empty
from pipeline.data.views import View, draw_view, render, to_chw
from pipeline.segmentation.scenes import Scenes, decode_scene

_LONGEST = 8  # windows: an image that is longer is squeezed


@dataclass
class SceneBatch:
    """images uint8 [B, 3, S, S], labels int16 [B, S, S]."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "SceneBatch":
        images, labels = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.labels))
        return SceneBatch(images, labels)


class SceneCrops:
    """Random resized crops and mirrors of images and labels alike; an `IndexedDataset`."""

    def __init__(self, scenes: Scenes, views: ViewConfig) -> None:
        self.scenes, self.views = scenes, views

    def __getitems__(self, requests: list[Request], empty: Empty = np.empty) -> SceneBatch:
        size = self.views.image_size
        pixels = empty((len(requests), size, size, 3), np.uint8)
        cut = empty((len(requests), size, size), np.int16)
        for row, (epoch, index) in enumerate(requests):
            image, labels = decode_scene(self.scenes, index)
            view = draw_view(self.views, index, epoch, image.height, image.width)
            pixels[row] = np.asarray(render(image, view, size))
            cut[row] = render_labels(labels, view, size)
        return SceneBatch(to_chw(pixels), torch.from_numpy(cut))


def render_labels(labels: NDArray[np.int16], view: View, size: int) -> NDArray[np.int16]:
    """The view's labels [size, size], each the one at the pixel's centre; the counterpart of `render`."""
    top, left, height, width = view.box
    rows = top + ((np.arange(size) + 0.5) * height / size).astype(np.int64)
    columns = left + ((np.arange(size) + 0.5) * width / size).astype(np.int64)
    cut = labels[np.ix_(rows, columns)]
    return cut[:, ::-1] if view.hflip else cut


@dataclass
class WindowBatch:
    """A few whole images as windows, and what is needed to put them together again.

    Attributes:
        windows: uint8 [W, 3, S, S], image after image.
        corners: for each image the (row, column) cell of each of its windows.
        cells: for each image (rows, columns) of its grid.
        labels: for each image int16 [H, W].
        indices: of the images.
    """

    windows: Tensor
    corners: list[list[tuple[int, int]]]
    cells: list[tuple[int, int]]
    labels: list[Tensor]
    indices: list[int]


class SceneWindows:
    """Whole images, the shorter side scaled to a window, cut into windows that overlap by a third and more.

    Sides and corners are whole cells, so that the windows' predictions fit together on one grid.

    Args:
        size: S, the side of a window, pixels.
        grid: cells of a side of a window.
    """

    def __init__(self, scenes: Scenes, size: int, grid: int) -> None:
        self.scenes, self.size, self.grid = scenes, size, grid

    def __getitems__(self, requests: list[Request], empty: Empty = np.empty) -> WindowBatch:
        windows, corners, cells, maps = [], [], [], []
        for _, index in requests:
            image, labels = decode_scene(self.scenes, index)
            rows, columns = self._cells(image.height, image.width)
            places = [(row, column) for row in self._starts(rows) for column in self._starts(columns)]
            windows += self._cut(image, (rows, columns), places)
            corners.append(places)
            cells.append((rows, columns))
            maps.append(torch.from_numpy(labels))
        pixels = empty((len(windows), self.size, self.size, 3), np.uint8)
        for row, window in enumerate(windows):
            pixels[row] = window
        return WindowBatch(to_chw(pixels), corners, cells, maps, [index for _, index in requests])

    def _cells(self, height: int, width: int) -> tuple[int, int]:
        scale = self.grid / min(height, width)
        rows, columns = (min(round(side * scale), _LONGEST * self.grid) for side in (height, width))
        return rows, columns

    def _starts(self, cells: int) -> list[int]:
        """First cells of windows that cover a side, evenly spread."""
        stride = max(1, 2 * self.grid // 3)
        count = -(-(cells - self.grid) // stride) + 1
        return [round(start) for start in np.linspace(0, cells - self.grid, count)]

    def _cut(
        self, image: Image.Image, cells: tuple[int, int], places: list[tuple[int, int]]
    ) -> list[NDArray[np.uint8]]:
        height, width = map(self._pixels, cells)
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        corners = [(self._pixels(row), self._pixels(column)) for row, column in places]
        return [pixels[top : top + self.size, left : left + self.size] for top, left in corners]

    def _pixels(self, cells: int) -> int:
        return cells * self.size // self.grid
