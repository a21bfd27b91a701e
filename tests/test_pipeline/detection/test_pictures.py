"""Pictures of annotations and detections."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from pipeline.detection import CocoImages, annotated_scene, detected_scene, draw_scenes
from pipeline.detection.pictures import Scene, _draw


def test_scenes_side_by_side(coco: CocoImages, tmp_path: Path) -> None:
    annotated = [annotated_scene(coco, index) for index in range(4)]
    assert [scene.names for scene in annotated] == [["green", "blue", "red"], [], ["blue"], ["red", "green"]]
    found = {
        "boxes": torch.tensor([[4.0, 20.0, 34.0, 50.0], [0.0, 0.0, 5.0, 5.0]]),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.8, 0.2]),
        "masks": torch.ones(2, 64, 96, dtype=torch.bool),
    }
    detected = detected_scene(annotated[0].image, found, coco.categories, min_score=0.5)
    assert detected.names == ["green 0.80"]
    path = draw_scenes(tmp_path / "deep/picture.png", {"annotated": annotated, "detected": [detected]}, "a title")
    pixels = np.asarray(Image.open(path))
    assert pixels.shape[0] > 1000
    assert pixels.std() > 10


def test_names_stay_inside_the_picture() -> None:
    boxes = np.array([[4.0, 0.0, 30.0, 20.0], [4.0, 30.0, 30.0, 50.0]])
    scene = Scene(np.zeros((64, 96, 3), np.uint8), boxes, np.array([1, 2]), ["a", "b"], np.zeros((2, 64, 96), np.uint8))
    axis = Figure().subplots()
    _draw(axis, scene)
    assert [text.get_va() for text in axis.texts] == ["top", "bottom"]


def test_a_mask_colours_its_pixels(coco: CocoImages, tmp_path: Path) -> None:
    plain, marked = annotated_scene(coco, 1), annotated_scene(coco, 2)
    pictures = [
        np.asarray(Image.open(draw_scenes(tmp_path / f"{i}.png", {"": [scene]}, "")), dtype=float)
        for i, scene in enumerate((plain, marked))
    ]
    assert np.abs(pictures[0] - pictures[1]).max() > 50
