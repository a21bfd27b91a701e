"""Average precision by pycocotools, and detections in COCO's result format."""

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from pipeline.detection.coco import CocoImages

# pycocotools' summary, in its order: the six average precisions, then average recalls, which are left out here.
_FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
_KINDS = {"box": "bbox", "mask": "segm"}


def as_results(detections: Mapping[str, Tensor], coco: CocoImages, index: int) -> list[dict[str, Any]]:
    """One image's detections (`Detector.detect`) as COCO's results: bbox is left, top, width, height, masks are RLE."""
    boxes = detections["boxes"].double().cpu().numpy()
    masks = np.asfortranarray(detections["masks"].permute(1, 2, 0).cpu().numpy().astype(np.uint8))  # [H, W, N]
    encoded = rle.encode(masks) if len(boxes) else []
    return [
        {
            "image_id": int(coco.ids[index]),
            "category_id": coco.categories[label - 1][0],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
            "segmentation": {"size": segment["size"], "counts": segment["counts"].decode("ascii")},
        }
        for (x1, y1, x2, y2), label, score, segment in zip(
            boxes.tolist(), detections["labels"].tolist(), detections["scores"].tolist(), encoded, strict=True
        )
    ]


def average_precision(coco: CocoImages, results: list[dict[str, Any]]) -> dict[str, float]:
    """Box and mask AP in 0..1, averaged over IoU 0.5 to 0.95; -1 where there is nothing to find, as pycocotools says.

    Returns:
        box_AP, box_AP50, box_AP75, box_AP_small, _medium, _large, and the same with mask_.
    """
    return {
        f"{kind}_{name}": value
        for kind, iou_type in _KINDS.items()
        for name, value in zip(_FIGURES, _summary(coco, results, iou_type), strict=True)
    }


def _summary(coco: CocoImages, results: list[dict[str, Any]], iou_type: str) -> list[float]:
    if not results:  # which pycocotools doesn't take
        return [0.0] * len(_FIGURES)
    # A mask's size is its own area; beside a box, pycocotools would take the box's.
    unwanted = "bbox" if iou_type == "segm" else "segmentation"
    results = [{key: value for key, value in result.items() if key != unwanted} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        truth = COCO()
        truth.dataset = coco.to_coco(masks=iou_type == "segm")
        truth.createIndex()
        scoring = COCOeval(truth, truth.loadRes(results), iou_type)
        scoring.evaluate()
        scoring.accumulate()
        scoring.summarize()
    return [float(value) for value in scoring.stats[: len(_FIGURES)]]
