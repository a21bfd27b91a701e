"""Batches: shapes, negatives, and images that are not what their annotation says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.loader import load_in_order
from pipeline.detection import CocoImages, DetectionDataset, JitterConfig, canvases, open_coco
from pipeline.errors import DataError
from tests.coco import HEIGHT, WIDTH, scene_annotations, write_coco


def test_a_training_batch(coco: CocoImages) -> None:
    batch = DetectionDataset(coco, 64, jitter=JitterConfig(scale=(1.0, 1.0))).__getitems__([(0, 0), (0, 1)])
    assert batch.images.shape == (2, 3, 64, 64)
    assert batch.images.dtype == torch.uint8
    assert batch.sizes == [(43, 64), (43, 64)]
    full, empty = batch.targets
    assert (full["boxes"].dtype, full["labels"].dtype, full["masks"].dtype) == (torch.float32, torch.int64, torch.uint8)
    assert full["boxes"].shape == (3, 4)
    assert full["masks"].shape == (3, 64, 64)
    assert empty["boxes"].shape == (0, 4)  # a negative
    assert empty["masks"].shape == (0, 64, 64)
    assert batch.to(torch.device("cpu")).targets[0]["labels"].tolist() == [1, 2, 3]


def test_the_same_request_is_the_same_batch(coco: CocoImages) -> None:
    dataset = DetectionDataset(coco, 64, jitter=JitterConfig(), seed=5)
    one, two = dataset.__getitems__([(3, 0), (3, 2)]), dataset.__getitems__([(3, 0), (3, 2)])
    assert torch.equal(one.images, two.images)
    assert not torch.equal(one.images, dataset.__getitems__([(4, 0), (4, 2)]).images)


def test_evaluation_shows_whole_images_in_order(coco: CocoImages) -> None:
    batches = load_in_order(DetectionDataset(coco, 64), range(1, 4, 2), batch_size=1, workers=0)
    assert [batch.indices for batch in batches] == [[1], [3]]
    (batch,) = load_in_order(DetectionDataset(coco, 64), range(4), batch_size=8, workers=0)
    assert batch.original_sizes == [(HEIGHT, WIDTH)] * 4
    assert not batch.targets


def test_images_without_annotations(coco: CocoImages) -> None:
    image = Image.open(coco.folder / coco.key(0)).convert("RGB")
    annotated = DetectionDataset(coco, 64).__getitems__([(0, index) for index in range(4)])
    bare = canvases([image, image.rotate(90, expand=True)], 64)
    assert torch.equal(bare.images[0], annotated.images[0])
    assert bare.sizes == [(43, 64), (64, 43)]
    assert bare.original_sizes == [(HEIGHT, WIDTH), (WIDTH, HEIGHT)]


def test_an_image_of_another_size_than_annotated(tmp_path: Path) -> None:
    content = scene_annotations()
    content["images"][2].update(width=97)
    coco = open_coco(*write_coco(tmp_path, content))
    with pytest.raises(DataError, match=r"image 2\.png has 96 × 64 pixels, its annotation says 97 × 64"):
        DetectionDataset(coco, 64).__getitems__([(0, 1)])


def test_an_image_that_is_absent_or_torn(tmp_path: Path) -> None:
    folder, file = write_coco(tmp_path)
    coco = open_coco(folder, file)
    (folder / "3.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"image 3\.png"):
        DetectionDataset(coco, 64).__getitems__([(0, 0)])
    (folder / "3.png").unlink()
    with pytest.raises(DataError, match=r"^image [^:]*3\.png: No such file"):
        DetectionDataset(coco, 64).__getitems__([(0, 0)])


def test_grey_images_become_colour(tmp_path: Path) -> None:
    folder, file = write_coco(tmp_path)
    Image.fromarray(np.full((HEIGHT, WIDTH), 200, np.uint8)).save(folder / "0.png")
    assert (DetectionDataset(open_coco(folder, file), 96).__getitems__([(0, 3)]).images[0, :, :64] == 200).all()


def test_an_image_that_can_not_be_placed_is_named(coco: CocoImages, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise MemoryError("no room\nfor masks")

    monkeypatch.setattr("pipeline.detection.dataset.place", broken)
    with pytest.raises(DataError, match=r"^image 2\.png: MemoryError: no room for masks; mend its annotations, or "):
        DetectionDataset(coco, 64, jitter=JitterConfig()).__getitems__([(0, 1)])
