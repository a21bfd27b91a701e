"""Pictures: titled grids of photographs, attention maps over them, features as colours, and confusion matrices."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from sklearn.decomposition import PCA
from torch import Tensor

from pipeline.confusion import confusion_counts
from pipeline.evaluation.metrics import class_hits
from pipeline.figures import save_figure

matplotlib.use("Agg")

_MOST_CLASSES = 40  # of a confusion matrix
_WORTH_A_NUMBER = 0.005  # share of a true class: below, a cell stays without


def draw_grid(
    path: Path, columns: Mapping[str, Sequence[NDArray[Any]]], title: str, names: Sequence[str] = (), side: float = 1.7
) -> Path:
    """Write a grid: one titled column for each entry, one row for each of its pictures ([H, W, 3] or [H, W]).

    Args:
        names: written beside the rows.
        side: of a picture, in inches of 130 dots.
    """
    rows = max(len(pictures) for pictures in columns.values())
    figure = Figure(figsize=(side * len(columns) + 0.4, side * rows + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(name, fontsize=8)
        for row in range(rows):
            axis = axes[row, column]
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if row < len(pictures):
                axis.imshow(pictures[row], cmap="viridis" if pictures[row].ndim == 2 else None)
            if column == 0 and row < len(names):
                axis.set_ylabel(names[row], fontsize=6)
    return save_figure(figure, path, dpi=130)


def draw_confusion(
    path: Path, labels: NDArray[np.int64], predicted: NDArray[np.int64], names: Sequence[str], title: str
) -> Path:
    """Write the confusion matrix: a row for each true class, whose cells are the shares of its images by prediction.

    Of more than `_MOST_CLASSES` it shows those of the lowest accuracy; what a row lacks of 1 went to other classes.

    Args:
        labels, predicted: int64 [N], below the number of `names`.
    """
    images, hits = class_hits(labels, predicted, len(names))
    accuracy = hits / np.maximum(images, 1)
    present = np.flatnonzero(images)
    shown = np.sort(present[np.argsort(accuracy[present], kind="stable")[:_MOST_CLASSES]])
    place = np.full(len(names), -1)
    place[shown] = np.arange(len(shown))
    rows = np.where(place[predicted] < 0, -1, place[labels])
    counts = confusion_counts(torch.from_numpy(rows), torch.from_numpy(place[predicted]), len(shown))
    shares = counts.numpy() / images[shown, None]
    side = 2.5 + 0.28 * len(shown)
    figure = Figure(figsize=(side, side), layout="constrained")
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(shares >= _WORTH_A_NUMBER):
        colour = "white" if shares[row, column] > 0.6 else "black"
        axis.text(column, row, f"{100 * shares[row, column]:.0f}", ha="center", va="center", fontsize=6, color=colour)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    which = "" if len(shown) == len(present) else f", the {len(shown)} lowest of {len(present)} classes"
    axis.set_title(f"{title}\npercent of each true class{which}", fontsize=8, parse_math=False)
    texts = [names[label] for label in shown]
    axis.set_xticks(range(len(shown)), texts, rotation=90, fontsize=7, parse_math=False)
    axis.set_yticks(range(len(shown)), texts, fontsize=7, parse_math=False)
    return save_figure(figure, path, dpi=110)


def as_pictures(images: Tensor) -> list[NDArray[np.float32]]:
    """Float images [N, 3, H, W] in [0, 1] → N arrays [H, W, 3]."""
    return list(images.permute(0, 2, 3, 1).cpu().numpy())


def as_maps(attention: Tensor, grid: tuple[int, int]) -> list[NDArray[np.float32]]:
    """Attention rows [N, L] → N maps [h, w]."""
    return list(attention.float().cpu().reshape(-1, *grid).numpy())


def head_maps(heads: Tensor, grid: tuple[int, int]) -> list[NDArray[np.float32]]:
    """Attention rows of H heads [N, H, L] → N mosaics of H maps, row by row; each map has its own maximum at 1."""
    maps = heads.float().cpu().unflatten(2, grid).numpy()  # [N, H, h, w]
    maps = maps / np.maximum(maps.max((2, 3), keepdims=True), 1e-12)
    columns = math.ceil(math.sqrt(maps.shape[1]))
    maps = np.pad(maps, ((0, 0), (0, -maps.shape[1] % columns), (0, 0), (0, 0)))
    return [np.concatenate([np.concatenate(row, 1) for row in np.split(m, len(m) // columns)]) for m in maps]


def highlight(
    pictures: Sequence[NDArray[np.float32]], maps: Sequence[NDArray[np.float32]]
) -> list[NDArray[np.float32]]:
    """Each photo [H, W, 3], dark where its map [h, w] is low; where the map is high it is bright, with a warm shine.

    Between the middles of cells the map is interpolated: `overlay` shows the cells themselves.
    """
    colours = matplotlib.colormaps["inferno"]
    out = []
    for picture, heat in zip(pictures, maps, strict=True):
        share = _stretch(heat, picture.shape[:2], Image.Resampling.BICUBIC).clip(0, 1)
        light = share[..., None]
        lit = picture * (0.25 + 0.55 * light) + 0.3 * light * colours(share)[..., :3]
        out.append(lit.clip(0, 1).astype(np.float32))
    return out


def _stretch(heat: NDArray[np.float32], size: tuple[int, ...], how: Image.Resampling) -> NDArray[np.float32]:
    """A map [h, w] as shares of its highest values, at a size (H, W).

    Cut at the 98th percentile: one bright cell would leave the others black.
    """
    share = np.clip(heat / max(float(np.percentile(heat, 98)), 1e-12), 0, 1).astype(np.float32)
    return np.asarray(Image.fromarray(share).resize((size[1], size[0]), how))


def overlay(pictures: Sequence[NDArray[np.float32]], maps: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """Each map [h, w] as colour, cell by cell, over its picture [H, W, 3] in grey; bright where the map is highest."""
    colours = matplotlib.colormaps["inferno"]
    out = []
    for picture, heat in zip(pictures, maps, strict=True):
        cells = _stretch(heat, picture.shape[:2], Image.Resampling.NEAREST)
        grey = picture.mean(-1, keepdims=True)
        out.append((0.3 * grey + 0.7 * colours(cells)[..., :3]).astype(np.float32))
    return out


def pca_maps(tokens: Tensor, grid: tuple[int, int]) -> list[NDArray[np.float32]]:
    """Tokens [N, L, D] → N maps [h, w, 3]: the first three principal components of all N·L tokens as red, green, blue.

    One basis for all pictures, so that a colour means the same feature in each; every component runs from its 2nd to
    its 98th percentile. With fewer than three components the other colours are at half.
    """
    flat = tokens.float().cpu().reshape(-1, tokens.shape[-1]).numpy()
    with np.errstate(invalid="ignore"):  # equal tokens have no variance for sklearn to divide by, and no colour either
        components = PCA(min(3, *flat.shape), svd_solver="full").fit_transform(flat)
    low, high = np.percentile(components, [2, 98], axis=0)
    colours = np.full((len(flat), 3), 0.5, np.float32)
    colours[:, : components.shape[1]] = np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1)
    return list(colours.reshape(-1, *grid, 3))
