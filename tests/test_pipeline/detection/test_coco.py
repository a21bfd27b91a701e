"""COCO files: what is read, what is left out and counted, and the one line for what is malformed."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO

from pipeline.data.readable import leave_unreadable_out
from pipeline.detection import CocoImages, open_coco
from pipeline.detection.placement import as_mask
from pipeline.errors import DataError
from tests.coco import CATEGORIES, HEIGHT, SCENES, WIDTH, polygon, rectangle, scene_annotations, write_coco


def reopened(root: Path, change: Callable[[dict[str, Any]], object]) -> CocoImages:
    content = scene_annotations()
    change(content)
    return open_coco(*write_coco(root, content))


def test_images_are_sorted_and_keep_their_objects(coco: CocoImages) -> None:
    assert coco.ids.tolist() == [37, 38, 39, 40]
    assert [coco.key(i) for i in range(4)] == ["3.png", "2.png", "1.png", "0.png"]
    assert [len(coco.instances(i).labels) for i in range(4)] == [3, 0, 1, 2]
    assert coco.size(0) == (HEIGHT, WIDTH)
    assert coco.read(0).startswith(b"\x89PNG")


def test_category_ids_survive_the_round_trip(coco: CocoImages) -> None:
    assert coco.categories == ((3, "green"), (7, "blue"), (90, "red"))
    for place, scene in enumerate(reversed(SCENES)):
        labels = coco.instances(place).labels
        assert [coco.categories[label - 1][0] for label in labels] == [category for category, *_ in scene]
    given, back = scene_annotations(), coco.to_coco()
    wanted = {a["id"]: a["category_id"] for a in given["annotations"]}
    assert {a["id"]: a["category_id"] for a in back["annotations"]} == wanted
    assert sorted(back["categories"], key=str) == sorted(CATEGORIES, key=str)


def test_polygons_and_both_kinds_of_rle_are_the_same_masks(coco: CocoImages) -> None:
    for place, scene in enumerate(reversed(SCENES)):
        for segment, (_, *box) in zip(coco.instances(place).segments, scene, strict=True):
            assert (as_mask(segment, HEIGHT, WIDTH) == rectangle(*box)).all()


def test_a_limit_takes_images_evenly(tmp_path: Path) -> None:
    coco = open_coco(*write_coco(tmp_path), limit=2)
    assert coco.ids.tolist() == [37, 39]
    assert [len(coco.instances(i).labels) for i in range(2)] == [3, 1]


def test_crowds_are_kept_for_evaluation_alone(tmp_path: Path) -> None:
    coco = reopened(tmp_path, lambda content: content["annotations"][1].update(iscrowd=1))
    assert len(coco.instances(3).labels) == 1
    assert sum(a["iscrowd"] for a in coco.to_coco()["annotations"]) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"bbox": [10, 10, 0, 5]},
        {"bbox": [10, 10, 5, -2]},
        {"bbox": [WIDTH + 1, 3, 10, 10]},
        {"segmentation": []},
        {"segmentation": [[1, 1, 9, 9]]},  # two points, which pycocotools would take for a box
    ],
    ids=str,
)
def test_degenerate_annotations_are_dropped_with_a_count(
    tmp_path: Path, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        coco = reopened(tmp_path, lambda content: content["annotations"][0].update(change))
    assert "1 annotations have no area inside their image (the first is 500)" in caplog.text
    assert len(coco.instances(3).labels) == 1


def test_boxes_are_cut_at_the_edges(tmp_path: Path) -> None:
    box = [-5, -3, 30, 20]
    coco = reopened(
        tmp_path, lambda content: content["annotations"][0].update(bbox=box, segmentation=polygon(*box), area=600)
    )
    assert coco.instances(3).boxes[0].tolist() == [0, 0, 25, 17]
    assert next(a for a in coco.to_coco()["annotations"] if a["id"] == 500)["bbox"] == box  # scored as annotated


def rle(counts: Any) -> dict[str, Any]:
    return {"segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}}


def test_what_pycocotools_compresses_is_accepted(tmp_path: Path) -> None:
    """Random masks, from specks to long runs, the differences of whose runs have either sign."""
    rng, content = np.random.default_rng(0), scene_annotations()
    masks = [rng.random((HEIGHT, WIDTH)) < share for share in np.linspace(0, 1, 40)]
    for number, mask in enumerate(masks):
        encoded = coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
        one = {**content["annotations"][0], **rle(encoded), "id": number, "image_id": 38}
        content["annotations"].append(one)
    coco = open_coco(*write_coco(tmp_path, content))
    segments = coco.instances(1).segments
    assert all((as_mask(one, HEIGHT, WIDTH) == mask).all() for one, mask in zip(segments, masks, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [1, 2, 3]}, r"annotation 500: bbox: needs 4 values or more"),
        ({"bbox": [1, 2, 3, "4"]}, r"annotation 500: bbox: must be a number"),
        ({"bbox": [1, 2, 3, float("nan")]}, r"annotation 500: bbox: must be a finite number"),
        ({"category_id": 4}, r"annotation 500: category_id 4 is not among the categories"),
        ({"image_id": 4}, r"annotation 500: image_id 4 is not among the images"),
        ({"id": 499}, r"annotation 499: the id is there twice"),
        ({"iscrowd": 2}, r"annotation 500: iscrowd: must be 1 or less"),
        ({"segmentation": None}, r"annotation 500: segmentation: must be a list of polygons, .* or an RLE of size"),
        ({"segmentation": [1, 1, 5, 5, 9, 9]}, r"annotation 500: segmentation: must be a list of polygons"),
        ({"segmentation": {}}, r"annotation 500: segmentation: must be a list of polygons"),
        ({"segmentation": {"size": [5, 5]}}, r"annotation 500: segmentation: must be a list of polygons"),
        ({"segmentation": [[1, 1, "5", 5, 9, 9]]}, r"annotation 500: segmentation: must be a list of polygons"),
        ({"segmentation": [[1, 1, 5, 5, 9, 1e9]]}, r"annotation 500: segmentation: a polygon goes to 1e\+09"),
        ({"segmentation": [[1, 1, 5, 5, -1e9, 9], []]}, r"annotation 500: segmentation: a polygon goes to -1e\+09"),
        ({"segmentation": [[1, 1, 5, 5, 9]]}, r"annotation 500: segmentation: a polygon has an odd number"),
        ({"segmentation": {"size": [5, 5], "counts": [25]}}, r"annotation 500: segmentation: its size \[5, 5\] is not"),
        (
            {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [3, 4]}},
            r"annotation 500: segmentation: its counts don't add up",
        ),
        (rle([-5, HEIGHT * WIDTH + 5]), r"annotation 500: segmentation: one of its counts is negative"),
        (rle("abc"), r"annotation 500: segmentation: its counts are no compressed RLE"),  # ends inside a number
        (rle("o" * 1000), r"annotation 500: segmentation: its counts are no compressed RLE"),
        (rle("é1"), r"annotation 500: segmentation: its counts are no compressed RLE"),
        (rle("0"), r"annotation 500: segmentation: its counts don't add up"),
        (rle(""), r"annotation 500: segmentation: its counts don't add up"),
        (rle("O"), r"annotation 500: segmentation: one of its counts is negative"),
        ({"id": 2**63}, r"annotation 9223372036854775808: id: must be less than"),
        ({"image_id": -(2**63) - 1}, r"annotation 500: image_id: must be -9223372036854775808 or more"),
    ],
    ids=str,
)
def test_a_malformed_annotation_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        reopened(tmp_path, lambda content: content["annotations"][0].update(change))
    assert "\n" not in str(error.value)


def drop(key: str, field: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content[key][1].pop(field)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("annotations", "id"), "annotation number 2, without an id: id: is missing"),
        (drop("annotations", "category_id"), "annotation 499: category_id: is missing"),
        (drop("images", "width"), "image 39: width: is missing"),
        (drop("categories", "name"), "category 3: name: is missing"),
        (lambda content: content.pop("annotations"), "no list of annotations in it"),
        (lambda content: content["images"].clear(), "no images in it"),
        (lambda content: content["categories"].clear(), "no categories in it"),
        (lambda content: content["images"].append(content["images"][0]), "image 40: the id is there twice"),
        (lambda content: content["images"][0].update(id=2**63), "image 9223372036854775808: id: must be less"),
        (lambda content: content["images"][0].update(width=2**63), "image 40: width: must be less"),
        (lambda content: content["categories"][0].update(id=2**64), "category 18446744073709551616: id: must be"),
        (lambda content: content["annotations"].insert(0, 7), "annotation number 1, without an id"),
    ],
)
def test_a_malformed_file_is_one_line(tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        reopened(tmp_path, change)


@pytest.mark.parametrize(("text", "message"), [("{", "is no JSON"), ("[]", "holds no keys and values")])
def test_a_file_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    folder, file = write_coco(tmp_path)
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        open_coco(folder, file)
    with pytest.raises(DataError, match="No such file"):
        open_coco(folder, tmp_path / "absent.json")
    with pytest.raises(DataError, match="no such folder of images"):
        open_coco(tmp_path / "absent", file)


def test_an_area_that_is_missing_is_the_boxs(tmp_path: Path) -> None:
    coco = reopened(tmp_path, lambda content: content["annotations"][0].pop("area"))
    assert next(a for a in coco.to_coco()["annotations"] if a["id"] == 500)["area"] == 32 * 40


def test_real_annotations_are_what_pycocotools_reads(real_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = real_data / "coco128/instances_train2017.json"
    coco, theirs = open_coco(real_data / "coco128/images/train2017", file), COCO(str(file))
    assert len(coco) == 100
    assert len(coco.labels) == 746
    for index in range(0, 100, 9):
        height, width = coco.size(index)
        annotations = theirs.loadAnns(theirs.getAnnIds(imgIds=[int(coco.ids[index])]))
        instances = coco.instances(index)
        assert [coco.categories[label - 1][0] for label in instances.labels] == [a["category_id"] for a in annotations]
        for segment, annotation in zip(instances.segments, annotations, strict=True):
            assert (as_mask(segment, height, width) == theirs.annToMask(annotation)).all()
    assert np.isclose(coco.areas.sum(), sum(a["area"] for a in json.loads(file.read_text())["annotations"]))


def test_boxes_without_masks_are_refused_for_training(tmp_path: Path) -> None:
    """They would be trained on as background."""

    def take_masks(content: dict[str, Any]) -> None:
        content["annotations"][0]["segmentation"] = []
        del content["annotations"][2]["segmentation"]

    coco = reopened(tmp_path, take_masks)
    with pytest.raises(DataError, match=r"^data\.train: 2 of 6 annotations \(the first is 498\) have a box and"):
        coco.check_trainable("data.train")
    coco.check_scorable("data.val")


def crowds(content: dict[str, Any]) -> None:
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1


def points(content: dict[str, Any]) -> None:
    for annotation in content["annotations"]:
        annotation["segmentation"] = [[1, 1, 9, 9]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["annotations"].clear(), "no object in it: 4 images have 0 annotations$"),
        (crowds, r"no object in it: 4 images have 6 annotations, all of them crowds \(iscrowd\)$"),
        (points, "nothing to learn from: of 6 annotations none has an area inside its image$"),
    ],
)
def test_nothing_to_learn_from(tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    coco = reopened(tmp_path, change)
    with pytest.raises(DataError, match=f"^data.train: {message}"):
        coco.check_trainable("data.train")


def test_selected_images_keep_their_annotations(coco: CocoImages) -> None:
    part = coco.select(np.array([0, 1, 3]))
    assert [part.key(index) for index in range(3)] == ["3.png", "2.png", "0.png"]
    for index, former in enumerate((0, 1, 3)):
        found, expected = part.instances(index), coco.instances(former)
        assert (found.labels.tolist(), found.segments) == (expected.labels.tolist(), expected.segments)
        np.testing.assert_array_equal(found.boxes, expected.boxes)
    everything = {annotation["id"]: annotation for annotation in coco.to_coco()["annotations"]}
    assert all(everything[annotation["id"]] == annotation for annotation in part.to_coco()["annotations"])
    assert part.digest != coco.digest


def test_images_that_are_not_there(tmp_path: Path) -> None:
    folder, file = write_coco(tmp_path)
    (folder / "3.png").unlink()
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:400])
    with pytest.raises(DataError, match=r"^2 of 4 images of data\.val .* \(3\.png: No such file.*; 2\.png: not a"):
        leave_unreadable_out({"data.val": open_coco(folder, file)})
