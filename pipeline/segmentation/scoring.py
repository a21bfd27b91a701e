"""Mean intersection over union, from one confusion matrix of all pixels; and labels as colours."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray

from pipeline.segmentation.scenes import IGNORED

_COLOURS = np.array(colormaps["tab20"].colors, np.float32)  # type: ignore[attr-defined]


def class_scores(counts: NDArray[np.int64], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """{name: {"pixels", "IoU"}} of each class that was there or was predicted.

    IoU: pixels that are of the class and predicted so, over those that are one of both.
    """
    truth, found, both = counts.sum(1), counts.sum(0), counts.diagonal()
    union = truth + found - both
    return {
        names[label]: {"pixels": int(truth[label]), "IoU": float(both[label] / union[label])}
        for label in np.flatnonzero(union).tolist()
    }


def mean_scores(counts: NDArray[np.int64]) -> dict[str, float]:
    """mIoU, the mean over classes that were there or were predicted, and the share of pixels that are right."""
    classes = class_scores(counts, list(map(str, range(len(counts)))))
    mean = sum(scores["IoU"] for scores in classes.values()) / max(len(classes), 1)
    return {"mIoU": mean, "pixel_accuracy": float(counts.diagonal().sum() / max(counts.sum(), 1))}


def colour_labels(labels: NDArray[np.integer]) -> NDArray[np.float32]:
    """Labels [H, W] → colours [H, W, 3] in 0..1, one a class; black where there is no class."""
    # Twenty colours, darker with each round, so that a hundred classes differ.
    shade = 0.8 ** (labels // len(_COLOURS))
    return np.where((labels == IGNORED)[..., None], 0, _COLOURS[labels % len(_COLOURS)] * shade[..., None]).astype(
        np.float32
    )
