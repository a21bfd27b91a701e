"""Labelled sets: how two of them are found and matched, and what is refused in one line."""

import io
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.configs.data import DataConfig, ValConfig
from pipeline.data.labelled import LabelledDataset, hold_back, match_classes, open_labelled, open_splits
from pipeline.errors import ConfigError, DataError


def tree(root: Path, *classes: str, images: int = 2) -> DataConfig:
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(images):
            Image.new("RGB", (12, 10), (number, 0, 0)).save(root / name / f"{number}.png")
    return DataConfig(path=str(root), workers=0)


def tars(path: Path, labels: list[str | None]) -> DataConfig:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10)).save(buffer, "PNG")
    with tarfile.open(path, "w") as tar:
        for number, label in enumerate(labels):
            for suffix, content in ((".png", buffer.getvalue()), (".cls", label and label.encode())):
                if content is not None:
                    info = tarfile.TarInfo(f"{number:03d}{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return DataConfig(path=str(path), workers=0)


def test_a_folder_of_train_and_val(tmp_path: Path) -> None:
    """As torchvision's sets lie. A limit is the training set's."""
    tree(tmp_path / "train", "cat", "dog", images=3)
    tree(tmp_path / "val", "cat", "dog")
    train, val, classes = open_splits(DataConfig(path=str(tmp_path), limit=4))
    assert (len(train), len(val), classes, train.classes) == (4, 4, 2, ("cat", "dog"))


def test_validation_may_lack_classes_and_its_labels_still_mean_the_same(tmp_path: Path) -> None:
    train, val, classes = open_splits(tree(tmp_path / "a", "ant", "bee", "cat"), tree(tmp_path / "b", "cat"))
    assert classes == 3
    assert val.labels.tolist() == [2, 2]
    assert val.classes == train.classes


def test_tars_by_number(tmp_path: Path) -> None:
    train, val, classes = open_splits(tars(tmp_path / "a.tar", ["0", "2", "1"]), tars(tmp_path / "b.tar", ["1"]))
    assert (train.labels.tolist(), val.labels.tolist(), classes) == ([0, 2, 1], [1], 3)


def test_training_views_and_central_crops(tmp_path: Path) -> None:
    source = open_labelled("data.path", tree(tmp_path, "cat", "dog"))
    batch = LabelledDataset(source, 8, crop=1.0).__getitems__([(0, 0), (0, 3)])
    assert (batch.images.shape, batch.labels.tolist()) == ((2, 3, 8, 8), [0, 1])


def test_what_is_refused(tmp_path: Path) -> None:
    good = tree(tmp_path / "good", "cat", "dog")
    one = tree(tmp_path / "one", "cat")
    strange = tree(tmp_path / "strange", "cat", "emu", "fox", "gnu", "hen")
    flat = DataConfig(path=str(tmp_path / "good/cat"))
    whole = DataConfig(path=str(tmp_path / "whole"))
    tree(tmp_path / "whole/train", "cat", "dog")
    tree(tmp_path / "whole/val", "cat", "dog")
    numbers = tars(tmp_path / "numbers.tar", ["0", "1"])
    cases = [
        (good, DataConfig(path=str(tmp_path / "no")), DataError, "val.path: no such file or folder: .*no"),
        (good, None, ConfigError, "'val.path' is missing"),
        (flat, good, DataError, "data.path=.*cat holds images but no class folders"),
        (good, flat, DataError, "val.path=.*cat holds images but no class folders"),
        (one, one, DataError, "one class alone"),
        (good, strange, DataError, "different classes than data.path: it lacks emu, fox, gnu and 1 more"),
        (whole, good, DataError, "holds train/ and val/: leave val.path out"),
        (numbers, tars(tmp_path / "high.tar", ["0", "7"]), DataError, "label 7, out of range: .* up to 1 only"),
        (tars(tmp_path / "gap.tar", ["0", "900"]), numbers, DataError, "label 900, but .* only 2 images of 2 classes"),
        (tars(tmp_path / "some.tar", ["0", None]), numbers, DataError, "has no class: give a class-folder tree"),
        (tars(tmp_path / "minus.tar", ["0", "-4"]), numbers, DataError, "has no class"),
        (tars(tmp_path / "word.tar", ["0", "cat"]), numbers, DataError, "^word.tar/001.cls holds no class number"),
        (numbers, tars(tmp_path / "huge.tar", ["9" * 20]), DataError, "^huge.tar/000.cls holds no class number"),
        (numbers, tars(tmp_path / "none.tar", [None]), DataError, "none.tar/000.png has no class"),
    ]
    for train, val, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            open_splits(train, val)
        assert "\n" not in str(caught.value)


def test_known_classes_are_those_of_training(tmp_path: Path) -> None:
    """As evaluation alone has them: from a checkpoint, without the training images."""
    val = open_labelled("val.path", tree(tmp_path, "cat", "dog"))
    assert match_classes(val, ("ant", "cat", "dog"), 3, "init=RUN").labels.tolist() == [1, 1, 2, 2]
    np.testing.assert_array_equal(match_classes(val, (), 2, "init=RUN").labels, val.labels)
    with pytest.raises(DataError, match="different classes than init=RUN: it lacks dog"):
        match_classes(val, ("cat", "eel"), 2, "init=RUN")
    with pytest.raises(DataError, match="init=RUN knows labels up to 0 only"):
        match_classes(val, (), 1, "init=RUN")


def test_folders_called_by_numbers_against_class_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Sorted as text, 10 comes before 2; class 2 of the tars is folder 2 all the same, on either side."""
    names = [str(number) for number in range(12)]
    folders, numbers = tree(tmp_path / "folders", *names, images=1), tars(tmp_path / "numbers.tar", names)
    _, val, classes = open_splits(numbers, folders)
    assert classes == 12
    assert [int(val.key(index).split("/")[0]) for index in range(12)] == val.labels.tolist()
    train, val, _ = open_splits(folders, numbers)
    assert [train.classes[label] for label in val.labels] == names
    assert sum("by what they are called" in record.message for record in caplog.records) == 2
    # The labels of a training set stay as they are: checkpoints hold them.
    assert train.labels.tolist() == list(range(12))


def test_numbers_that_are_no_folders_and_folders_that_are_no_classes(tmp_path: Path) -> None:
    numbers = tars(tmp_path / "numbers.tar", ["0", "1", "2"])
    with pytest.raises(DataError, match=r"^val\.path: the class folder 3 is called by a number, but data\.path knows"):
        open_splits(numbers, tree(tmp_path / "from_one", "1", "2", "3"))
    with pytest.raises(DataError, match=r"numbers\.tar/000\.png has label 0, and no class folder of data\.path"):
        open_splits(tree(tmp_path / "also_from_one", "1", "2", "3"), numbers)


def test_names_against_numbers_are_counted_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    numbers = tars(tmp_path / "numbers.tar", ["0", "1", "2"])
    assert open_splits(numbers, tree(tmp_path / "padded", "00", "01", "02"))[1].labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    names = tree(tmp_path / "all", "ant", "bee", "cat")
    assert open_splits(numbers, names)[1].labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert open_splits(names, numbers)[1].labels.tolist() == [0, 1, 2]
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [text.split(" have names")[0] for text in warnings] == [
        "the class folders of val.path",
        "the class folders of data.path",
    ]
    assert all(text.endswith("in the order of the names: ant is 0, bee is 1, cat is 2") for text in warnings)
    with pytest.raises(
        DataError, match=r"2 class folders with names \(bee, \.\.\.\) and data\.path knows 3 numbers: which"
    ):
        open_splits(numbers, tree(tmp_path / "some", "bee", "cat"))


def test_a_share_is_held_back_of_each_class(tmp_path: Path) -> None:
    for name, count in (("ant", 20), ("bee", 7), ("cat", 1)):
        tree(tmp_path, name, images=count)
    source = open_labelled("data.path", DataConfig(path=str(tmp_path)))
    train, val = hold_back(source, 0.1)
    assert np.bincount(val.labels, minlength=3).tolist() == [2, 1, 0]  # the only cat is learnt from
    assert np.bincount(train.labels).tolist() == [18, 6, 1]
    assert not {*train.keys.tolist()} & {*val.keys.tolist()}
    assert hold_back(source, 0.1)[1].keys.tolist() == val.keys.tolist()


def test_the_split_outlives_new_images(tmp_path: Path) -> None:
    """A key's hash decides: of other images a new one takes the place of one at most."""
    tree(tmp_path, "ant", images=40)
    former = hold_back(open_labelled("data.path", DataConfig(path=str(tmp_path))), 0.2)[1]
    Image.new("RGB", (12, 10)).save(tmp_path / "ant" / "0a.png")
    later = hold_back(open_labelled("data.path", DataConfig(path=str(tmp_path))), 0.2)[1]
    assert len({*former.keys.tolist()} & {*later.keys.tolist()}) >= len(former) - 1


def test_nothing_to_hold_back(tmp_path: Path) -> None:
    source = open_labelled("data.path", tree(tmp_path, "ant", "bee", images=1))
    with pytest.raises(DataError, match=r"val\.share=0\.5 holds no image back: no class of data\.path has two images"):
        hold_back(source, 0.5)
    with pytest.raises(ValueError, match=r"leave val\.path and val\.limit out"):
        ValConfig(path="x", share=0.5)
