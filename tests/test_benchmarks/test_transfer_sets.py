"""The further data sets: which pictures, of which class, in which split."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import transfer_sets
from pipeline.data.images import open_images


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """One photo a split: a dog, a person that reaches the border, a spoon too small, and a crowd."""
    root = tmp_path / "coco"
    for split in ("train", "val"):
        (root / f"images/{split}2017").mkdir(parents=True)
        pixels = np.full((80, 120, 3), 100, np.uint8)
        pixels[10:50, 20:60] = (250, 0, 0)
        Image.fromarray(pixels).save(root / f"images/{split}2017/7.png")
        boxes = [(18, [20, 10, 40, 40], 0), (1, [90, 0, 30, 30], 0), (50, [0, 0, 40, 8], 0), (1, [0, 0, 90, 80], 1)]
        content = {
            "images": [{"id": 3, "file_name": "7.png"}],
            "annotations": [
                {"image_id": 3, "category_id": category, "bbox": box, "iscrowd": crowd}
                for category, box, crowd in boxes
            ],
        }
        (root / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def test_objects_are_cut_with_a_margin_and_named_by_group(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transfer_sets.main(coco, tmp_path / "out")
    assert capsys.readouterr().out.splitlines()[1].endswith("objects: 4 pictures")
    for split in ("train", "val"):
        source = open_images(str(tmp_path / "out/objects" / split))
        assert list(source.classes) == ["animal", "person"]
        assert len(source) == 2
    dog = np.asarray(Image.open(next((tmp_path / "out/objects/train/animal").iterdir())))
    assert dog.shape == (96, 96, 3)
    assert (dog[48, 48] > [230, 0, 0]).tolist() == [True, False, False]
    assert 80 < dog[1, 1].max() < 130  # two pixels of the surroundings
    person = np.asarray(Image.open(next((tmp_path / "out/objects/train/person").iterdir())))
    assert person[48, 95].max() == 0  # beyond the photo


def test_digits_are_split_by_five(tmp_path: Path) -> None:
    assert transfer_sets.write(transfer_sets.digits(), tmp_path / "digits") == 1797
    sources = {split: open_images(str(tmp_path / "digits" / split)) for split in ("train", "val")}
    assert {split: len(source) for split, source in sources.items()} == {"train": 1437, "val": 360}
    assert min(Counter(sources["val"].labels.tolist()).values()) > 20
