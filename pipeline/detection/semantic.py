"""Instances as a class for each pixel."""

import numpy as np
from numpy.typing import NDArray

from pipeline.detection.coco import CocoImages
from pipeline.detection.placement import as_mask


def semantic_labels(coco: CocoImages, index: int, *, ignored: int) -> NDArray[np.int16]:
    """Labels [H, W]: 0 where no mask lies, else the label of the smallest object there; `ignored` in a crowd alone."""
    height, width = coco.size(index)
    labels = np.zeros((height, width), np.int16)
    for segment in coco.crowds(index):
        labels[as_mask(segment, height, width) > 0] = ignored
    instances = coco.instances(index)
    masks = [as_mask(segment, height, width) > 0 for segment in instances.segments]
    for place in sorted(range(len(masks)), key=lambda place: -int(masks[place].sum())):
        labels[masks[place]] = instances.labels[place]
    return labels
