"""Boxes, masks and names drawn onto images, one PNG for a person to look at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.decoding import decode
from pipeline.detection.coco import CocoImages
from pipeline.detection.placement import as_mask
from pipeline.figures import save_figure

matplotlib.use("Agg")

_COLOURS = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Scene:
    """An image and the objects to draw on it.

    Attributes:
        image: uint8 [H, W, 3].
        boxes: [N, 4] (x1, y1, x2, y2) pixels.
        labels: int [N], which choose the colours.
        names: N texts.
        masks: [N, H, W], non-zero inside.
    """

    image: NDArray[np.uint8]
    boxes: NDArray[Any]
    labels: NDArray[Any]
    names: list[str]
    masks: NDArray[Any]


def annotated_scene(coco: CocoImages, index: int) -> Scene:
    """An image with its annotations, crowds left out."""
    instances, (height, width) = coco.instances(index), coco.size(index)
    masks = [as_mask(segment, height, width) for segment in instances.segments]
    names = [coco.categories[label - 1][1] for label in instances.labels]
    image = np.asarray(decode(coco.read(index)))
    stacked = np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)
    return Scene(image, instances.boxes, instances.labels, names, stacked)


def detected_scene(
    image: NDArray[np.uint8], detections: Mapping[str, Tensor], categories: Sequence[tuple[int, str]], min_score: float
) -> Scene:
    """An image [H, W, 3] with its detections (`Detector.detect`) of at least `min_score`.

    Args:
        categories: (id, name) by label, from 1.
    """
    sure = (detections["scores"] >= min_score).cpu()
    kept = {key: value.cpu()[sure].numpy() for key, value in detections.items()}
    names = [
        f"{categories[label - 1][1]} {score:.2f}" for label, score in zip(kept["labels"], kept["scores"], strict=True)
    ]
    return Scene(image, kept["boxes"], kept["labels"], names, kept["masks"])


def draw_scenes(path: Path, columns: Mapping[str, Sequence[Scene]], title: str) -> Path:
    """Write a grid of pictures: one titled column for each entry, one row for each of its scenes."""
    rows = max(len(scenes) for scenes in columns.values())
    figure = Figure(figsize=(5 * len(columns), 4 * rows + 0.6), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, scenes) in enumerate(columns.items()):
        axes[0, column].set_title(name)
        for row in range(rows):
            axes[row, column].set_axis_off()
            if row < len(scenes):
                _draw(axes[row, column], scenes[row])
    return save_figure(figure, path, dpi=100)


def _draw(axis: Axes, scene: Scene) -> None:
    pixels = scene.image.astype(np.float32) / 255
    colours = [np.array(_COLOURS[label % len(_COLOURS)]) for label in scene.labels]
    for mask, colour in zip(scene.masks, colours, strict=True):
        inside = mask.astype(bool)
        pixels[inside] = 0.5 * pixels[inside] + 0.5 * colour
    axis.imshow(pixels)
    for (x1, y1, x2, y2), name, colour in zip(scene.boxes, scene.names, colours, strict=True):
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.5))
        label = {"facecolor": colour, "edgecolor": "none", "pad": 1, "alpha": 0.8}
        side = "bottom" if y1 > 0.05 * len(pixels) else "top"  # above the box, unless the picture ends there
        axis.text(x1, y1, name, fontsize=7, va=side, color="black", bbox=label, clip_on=True)
