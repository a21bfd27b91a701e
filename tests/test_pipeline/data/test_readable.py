"""Images that can't be read are found before any training."""

from pathlib import Path

import pytest
from PIL import Image

from pipeline.assembly.knn_callback import knn_callback
from pipeline.configs.data import DataConfig
from pipeline.configs.evaluation import KnnCallbackConfig
from pipeline.data.images import open_images
from pipeline.data.labelled import open_labelled
from pipeline.data.readable import check_readable
from pipeline.errors import DataError
from stages import finetune, pretrain
from tests.test_stages.conftest import ENCODER, MICRO, finetune_config, pretrain_config


def tree(root: Path, images: int = 40) -> Path:
    for number in range(images):
        folder = root / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (number, 0, 0)).save(folder / f"{number:02d}.png")
    return root


@pytest.mark.parametrize("fault", ["empty", "dangling", "two", "pointers"])
def test_what_can_be_known_at_the_start_is_said_in_one_line(tmp_path: Path, fault: str) -> None:
    root = tree(tmp_path / "set")
    check_readable(open_images(str(root)))
    image = root / "dog/11.png"
    image.unlink()
    if fault == "dangling":
        image.symlink_to(tmp_path / "nowhere.png")
    else:
        image.write_bytes(b"")
    if fault == "two":
        (root / "dog/13.png").write_bytes(b"")
    if fault == "pointers":
        for file in root.glob("*/*.png"):
            file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    message = {
        "two": r"set: image dog/11\.png is empty, or a link to nowhere \(and 1 more\): restore",
        "pointers": r"image cat/00\.png: not a readable image: .*; repair it or take it away",
    }.get(fault, r"set: image dog/11\.png is empty, or a link to nowhere: restore the file or take it away")
    with pytest.raises(DataError, match=message) as caught:
        open_labelled("val.path", DataConfig(path=str(root)))
    assert "\n" not in str(caught.value)


def test_no_stage_trains_before_it_says_so(tmp_path: Path) -> None:
    good, bad = tree(tmp_path / "good"), tree(tmp_path / "bad")
    (bad / "cat/02.png").write_bytes(b"")
    sets = {name: {"path": str(path), "workers": 0} for name, path in (("data", good), ("val", bad))}
    plain = {"mimic": {"objective": "mae"}, "views": {"image_size": 64}}
    starts = {
        "val": lambda: finetune.run(finetune_config(tmp_path, tmp_path / "out", student=ENCODER, **sets)),
        "knn": lambda: knn_callback(KnnCallbackConfig.model_validate(sets), 64),
        "mae": lambda: pretrain.run(pretrain_config(tmp_path / "out", data=sets["val"], student=MICRO, **plain)),
    }
    for start in starts.values():
        with pytest.raises(DataError, match=r"bad: image cat/02\.png is empty"):
            start()
    assert not (tmp_path / "out").exists()
