"""Images that can't be read are found before any training."""

import logging
from pathlib import Path

import pytest
from PIL import Image

from pipeline.assembly.knn_callback import knn_callback
from pipeline.configs.data import DataConfig
from pipeline.configs.evaluation import KnnCallbackConfig
from pipeline.data import listing_index
from pipeline.data.images import ImageSource, open_images
from pipeline.data.labelled import open_splits
from pipeline.data.readable import leave_unreadable_out
from pipeline.errors import DataError
from stages import finetune, pretrain
from tests.pictures import smooth_picture
from tests.test_pipeline.data.test_images import encode, write_tar
from tests.test_stages.conftest import ENCODER, MICRO, finetune_config, pretrain_config


def tree(root: Path, images: int = 40) -> Path:
    for number in range(images):
        folder = root / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (number, 0, 0)).save(folder / f"{number:02d}.png")
    return root


def bad_splits(root: Path, spoil: dict[str, bytes]) -> str:
    """The error of a training set and a validation set of 40 images each, some of them spoilt."""
    for name in ("train", "val"):
        tree(root / name)
    for name, content in spoil.items():
        (root / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_splits(DataConfig(path=str(root)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_bad_files_of_all_sets_are_named_at_once(tmp_path: Path) -> None:
    torn = tree(tmp_path / "whole") / "dog/11.png"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    spoil = {"train/dog/11.png": b"", "val/cat/02.png": torn.read_bytes()[:50], "val/dog/13.png": pointer}
    message = bad_splits(tmp_path / "set", spoil)
    assert message.startswith("1 of 40 images of data.path can't be read (dog/11.png: it is empty); ")
    assert "2 of 40 images of val.path can't be read (cat/02.png: not a readable image: " in message
    assert "; dog/13.png: not a readable image: " in message
    assert message.endswith(": restore the files or take them away")


def test_many_are_counted(tmp_path: Path) -> None:
    message = bad_splits(tmp_path, {f"val/dog/{number:02d}.png": b"" for number in range(1, 30, 2)})
    assert message.startswith("15 of 40 images of val.path can't be read (dog/01.png: it is empty")
    assert "dog/09.png: it is empty; and 10 more)" in message


def test_a_large_set_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening every file of ImageNet takes its time on a network file system, and its list says what changed."""
    monkeypatch.setenv("MRMAE_LISTINGS", str(tmp_path / "kept"))
    monkeypatch.setattr(listing_index, "WORTH_KEEPING", 1)
    monkeypatch.setattr(listing_index, "_QUIET", 0)
    root, looked = tree(tmp_path / "set", images=200), list[int]()
    ends = ImageSource.ends
    monkeypatch.setattr(ImageSource, "ends", lambda *args: looked.append(args[1]) or ends(*args))

    def looks(limit: int | None = None) -> int:
        looked.clear()
        leave_unreadable_out({"x": open_images(str(root), limit)})
        return len(looked)

    assert [looks(limit=50), looks(limit=50)] == [50, 50]  # a part says nothing of the whole
    assert [looks(), looks(), looks(limit=50)] == [200, 0, 0]
    (root / "cat/new.png").write_bytes(b"")
    assert [looks(), looks()] == [201, 201]  # what is left out is named at every start
    (root / "cat/new.png").unlink()
    assert [looks(), looks()] == [200, 0]


def test_links_to_nowhere(tmp_path: Path) -> None:
    root = tree(tmp_path / "set")
    (root / "cat/00.png").unlink()
    (root / "cat/00.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(
        DataError, match=r"^1 of 40 images of x can't be read \(cat/00\.png: No such file or directory\)"
    ):
        leave_unreadable_out({"x": open_images(str(root))})


def test_up_to_a_hundredth_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tree(tmp_path / "set", images=200)
    whole = open_images(str(root))
    assert leave_unreadable_out({"x": whole}) == [whole]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    (root / "cat/10.png").write_bytes(b"")
    (root / "dog/11.png").write_bytes((root / "dog/11.png").read_bytes()[:50])
    (kept,) = leave_unreadable_out({"x": open_images(str(root))})
    assert len(kept) == 198
    assert not {"cat/10.png", "dog/11.png"} & {kept.key(index) for index in range(198)}
    assert "2 of 200 images of x can't be read (cat/10.png: it is empty" in caplog.text
    (root / "dog/13.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"^3 of 200 images of x"):
        leave_unreadable_out({"x": open_images(str(root))})


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_a_torn_file_of_each_format(tmp_path: Path, kind: str) -> None:
    """Also in a tar. Whole ones pass, whatever stands behind their end."""
    good = encode(smooth_picture(0, 64, 80), kind)
    members = {f"{number:03d}.png": good for number in range(63)} | {"063.png": good + bytes(20)}
    write_tar(tmp_path / "a.tar", members)
    source = open_images(str(tmp_path / "a.tar"))
    assert leave_unreadable_out({"x": source}) == [source]
    write_tar(tmp_path / "a.tar", members | {"041.png": good[: len(good) * 2 // 3]})
    with pytest.raises(DataError, match=r"^1 of 64 images of x can't be read \(a\.tar/041\.png: not a readable image"):
        leave_unreadable_out({"x": open_images(str(tmp_path / "a.tar"))})


def test_whole_files_are_not_read_but_for_a_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_images(str(tree(tmp_path, images=200)))
    read: list[int] = []
    monkeypatch.setattr(ImageSource, "_read", lambda self, index: read.append(index) or self_read(self, index))
    leave_unreadable_out({"x": source})
    assert len(read) == 16


self_read = ImageSource._read


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
        with pytest.raises(DataError, match=r"^1 of 40 images of .* can't be read \(cat/02\.png: it is empty"):
            start()
    assert not (tmp_path / "out").exists()
