"""AP: equal to pycocotools run by hand on the same predictions, through rescaling, labels and RLE."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from pipeline.detection import CocoImages, as_results, average_precision, open_coco
from pipeline.detection.placement import as_mask
from tests.coco import scene_annotations, write_coco

FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


def perfect(coco: CocoImages, index: int) -> dict[str, Tensor]:
    """Detections that are the annotations themselves."""
    instances, size = coco.instances(index), coco.size(index)
    masks = [torch.from_numpy(as_mask(segment, *size)) for segment in instances.segments]
    return {
        "boxes": torch.from_numpy(instances.boxes).float(),
        "labels": torch.from_numpy(instances.labels),
        "scores": torch.linspace(0.9, 0.5, len(masks)),
        "masks": torch.stack(masks) > 0 if masks else torch.zeros(0, *size, dtype=torch.bool),
    }


def noisy(coco: CocoImages, index: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """Shifted boxes and masks, some missing, some of a wrong class, some twice."""
    found = perfect(coco, index)
    keep = torch.from_numpy(rng.random(len(found["labels"])) > 0.2).nonzero()[:, 0]
    keep = keep.repeat_interleave(torch.from_numpy(rng.integers(1, 3, len(keep))))
    found = {key: value[keep] for key, value in found.items()}
    shift = torch.from_numpy(rng.normal(0, 3, found["boxes"].shape)).float()
    found["boxes"] = found["boxes"] + shift
    moved = [mask.roll((int(by[0]), int(by[1])), (0, 1)) for mask, by in zip(found["masks"], shift, strict=True)]
    found["masks"] = torch.stack(moved) if moved else found["masks"]
    wrong = torch.from_numpy(rng.random(len(keep)) < 0.1)
    found["labels"] = torch.where(wrong, 1, found["labels"])
    found["scores"] = torch.from_numpy(rng.random(len(keep))).float()
    return found


def by_hand(file: Path, results: list[dict[str, Any]], iou_type: str) -> list[float]:
    truth = COCO(str(file))
    scoring = COCOeval(truth, truth.loadRes(results), iou_type)
    scoring.evaluate()
    scoring.accumulate()
    scoring.summarize()
    return [float(value) for value in scoring.stats[:6]]


def test_ap_equals_pycocotools_by_hand(real_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Boxes and RLE are written out here once more, straight from the tensors."""
    file = real_data / "coco128/instances_val2017.json"
    coco, rng = open_coco(real_data / "coco128/images/val2017", file), np.random.default_rng(0)
    results, boxes, masks = [], [], []
    ids = sorted(image["id"] for image in json.loads(file.read_text())["images"])
    category = sorted(one["id"] for one in json.loads(file.read_text())["categories"])
    for index in range(len(coco)):
        found = noisy(coco, index, rng)
        results += as_results(found, coco, index)
        for box, label, score, mask in zip(
            *(found[key] for key in ("boxes", "labels", "scores", "masks")), strict=True
        ):
            left, top, right, bottom = (float(side) for side in box)
            about = {"image_id": ids[index], "category_id": category[int(label) - 1], "score": float(score)}
            boxes.append({**about, "bbox": [left, top, right - left, bottom - top]})
            masks.append({**about, "segmentation": rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))})
    ours = average_precision(coco, results)
    for kind, iou_type, predictions in (("box", "bbox", boxes), ("mask", "segm", masks)):
        theirs = by_hand(file, predictions, iou_type)
        assert [ours[f"{kind}_{name}"] for name in FIGURES] == pytest.approx(theirs, abs=1e-9)
        assert 0.2 < theirs[0] < 0.9  # neither nothing nor everything right


def test_objects_without_a_polygon_count_for_boxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By pycocotools on the annotations as they are; it can't make masks of these, so mask AP is of the others."""
    content = scene_annotations()
    content["annotations"][1]["segmentation"] = []
    whole = open_coco(*write_coco(tmp_path / "whole"))
    coco = open_coco(*write_coco(tmp_path / "some", content))
    results = [one for index in range(len(coco)) for one in as_results(perfect(coco, index), coco, index)]
    boxes = [{key: value for key, value in one.items() if key != "segmentation"} for one in results]
    ours, theirs = average_precision(coco, results), by_hand(tmp_path / "some/instances.json", boxes, "bbox")
    assert [ours[f"box_{name}"] for name in FIGURES] == pytest.approx(theirs, abs=1e-9)
    assert ours["box_AP"] < 0.9  # the object is missed
    assert ours["mask_AP"] == pytest.approx(1.0)
    everything = [one for index in range(len(coco)) for one in as_results(perfect(whole, index), coco, index)]
    assert average_precision(coco, everything)["box_AP"] == pytest.approx(1.0)


def test_perfect_detections_score_one(coco: CocoImages) -> None:
    results = [one for index in range(len(coco)) for one in as_results(perfect(coco, index), coco, index)]
    ap = average_precision(coco, results)
    assert ap["box_AP"] == ap["mask_AP"] == pytest.approx(1.0)
    assert ap["box_AP_large"] == -1  # there is nothing large
    assert {one["category_id"] for one in results} == {3, 7, 90}
    json.dumps(results)


def test_wrong_categories_score_nothing(coco: CocoImages) -> None:
    results = [one for index in range(len(coco)) for one in as_results(perfect(coco, index), coco, index)]
    swapped = [{**one, "category_id": {3: 7, 7: 90, 90: 3}[one["category_id"]]} for one in results]
    assert average_precision(coco, swapped)["box_AP50"] < 0.2


def test_nothing_found_scores_nothing(coco: CocoImages) -> None:
    assert set(average_precision(coco, []).values()) == {0.0}


def test_a_crowd_is_neither_missed_nor_a_fault(tmp_path: Path) -> None:
    content = scene_annotations()
    content["annotations"][0]["iscrowd"] = 1
    content["annotations"][0]["segmentation"] = {"size": [64, 96], "counts": [64 * 8, 64 * 32, 64 * 56]}
    coco = open_coco(*write_coco(tmp_path, content))
    results = [one for index in range(len(coco)) for one in as_results(perfect(coco, index), coco, index)]
    inside = {"image_id": 40, "category_id": 90, "bbox": [10, 10, 20, 20], "score": 0.99}
    segment = rle.encode(np.asfortranarray(np.pad(np.ones((20, 20), np.uint8), ((10, 34), (10, 66)))))
    results.append({**inside, "segmentation": {**segment, "counts": segment["counts"].decode()}})
    ap = average_precision(coco, results)
    assert ap["box_AP"] == ap["mask_AP"] == pytest.approx(1.0)
