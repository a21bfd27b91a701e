"""Pictures that a person can read: reconstructions and attention maps, one labelled PNG grid each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

matplotlib.use("Agg")


def draw_grid(path: Path, columns: Mapping[str, Sequence[NDArray[Any]]], title: str) -> Path:
    """Write a grid: one titled column for each entry, one row for each of its pictures ([H, W, 3] or [H, W])."""
    rows = max(len(pictures) for pictures in columns.values())
    figure = Figure(figsize=(1.7 * len(columns) + 0.4, 1.7 * rows + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(name, fontsize=9)
        for row in range(rows):
            axis = axes[row, column]
            axis.set_axis_off()
            if row < len(pictures):
                axis.imshow(pictures[row], cmap="viridis" if pictures[row].ndim == 2 else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def as_pictures(images: Tensor) -> list[NDArray[np.float32]]:
    """Float images [N, 3, H, W] in [0, 1] → N arrays [H, W, 3]."""
    return list(images.permute(0, 2, 3, 1).cpu().numpy())


def as_maps(attention: Tensor, grid: tuple[int, int]) -> list[NDArray[np.float32]]:
    """Attention rows [N, L] → N maps [h, w]."""
    return list(attention.float().cpu().reshape(-1, *grid).numpy())
