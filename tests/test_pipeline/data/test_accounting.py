"""Every file and member is an image, a label, passed over by a rule and counted, or refused by name."""

import io
import logging
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.configs.data import DataConfig
from pipeline.data.decoding import decode
from pipeline.data.images import ImageSource, open_images
from pipeline.data.labelled import open_labelled
from pipeline.data.naming import EXTENSIONS
from pipeline.errors import DataError
from tests.test_pipeline.data.test_images import JPEG, encode, write_tar

DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(100)  # what macOS keeps of a file beside it


def listed(path: Path) -> list[str]:
    source = open_images(str(path))
    return [source.key(index) for index in range(len(source))]


def passed(caplog: pytest.LogCaptureFixture) -> str:
    lines = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    caplog.clear()
    return lines[0].partition("passed over: ")[2] if lines else ""


def fill(root: Path, names: Sequence[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(JPEG)
    return root


@pytest.fixture(autouse=True)
def hear(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


NAMES = [
    *(
        "0.jpg",
        "0.seg.png",
        "0.depth.tiff",
        "0.txt",
        "1.v2.jpg",
        "sub/2.JPG",
        "sub/2.seg.png",
        "._0.jpg",
        ".hidden.jpg",
    ),
    *("__MACOSX/0.jpg", "sub/.cache/3.jpg", "sub/@eaDir/3.jpg", "README", "n.00017"),
]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_one_rule_for_folders_and_tars(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    if kind == "folder":
        assert listed(fill(tmp_path, NAMES)) == ["0.jpg", "1.v2.jpg", "sub/2.JPG"]
        hidden = 5  # a hidden folder counts once
    else:
        assert listed(write_tar(tmp_path / "a.tar", dict.fromkeys(NAMES, JPEG))) == [
            *("a.tar/0.jpg", "a.tar/1.v2.jpg", "a.tar/sub/2.JPG"),
        ]
        hidden = 5
    assert sorted(passed(caplog).split(", ")) == sorted(
        [
            f"{hidden} hidden",
            *("2 .seg.png beside an image", "1 .depth.tiff beside an image", "1 .txt", "1 without an ending"),
            "1 of other endings",
        ]
    )


def test_nothing_is_said_where_nothing_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "a.tar", {"./a.jpg": JPEG, "./a.cls": b"0", "b.jpg": JPEG, "b.cls": b"1"})
    assert listed(tmp_path / "a.tar") == ["a.tar/./a.jpg", "a.tar/b.jpg"]
    assert open_images(str(tmp_path / "a.tar")).labels.tolist() == [0, 1]
    assert passed(caplog) == ""


def test_classes_of_keys_with_dots(tmp_path: Path) -> None:
    """By WebDataset's rule KEY.cls; and by the whole name, as it stands beside the image."""
    members = {"a.v2.jpg": JPEG, "a.v2.cls": b"4", "b.v2.jpg": JPEG, "b.cls": b"5", "c.jpg": JPEG, "c.v2.cls": b"6"}
    assert open_images(str(write_tar(tmp_path / "a.tar", members))).labels.tolist() == [4, 5, -1]


def test_what_macos_packs_beside_each_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {"._0.jpg": DOUBLE, "0.jpg": JPEG, "._0.cls": DOUBLE, "0.cls": b"1", "x/._2.jpg": DOUBLE}
    source = open_images(str(write_tar(tmp_path / "a.tar", members)))
    assert (len(source), source.labels.tolist(), source.text_class) == (1, [1], "")
    assert passed(caplog) == "3 hidden"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.jpg", "b.jpg", "a.jpg"], r"x\.tar holds a\.jpg twice"),
        (["a.jpg", "./a.jpg"], r"x\.tar holds \./a\.jpg twice"),
        (["a.jpg", "a.png"], r"x\.tar has a\.jpg and a\.png, two images of one key"),
        (["s/a.jpg", "s/a.JPG"], r"s/a\.jpg and s/a\.JPG, two images of one key"),
        (["a.left.jpg", "a.right.jpg"], r"a\.left\.jpg and a\.right\.jpg, two images of one key"),
        (["a.seg.png", "a.jpg", "a.seg.png"], r"holds a\.seg\.png twice"),
        (["a.jpg", "a.cls", "a.cls"], r"holds a\.cls twice"),
    ],
)
def test_what_can_be_meant_in_two_ways(tmp_path: Path, names: list[str], message: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"0"))
    with pytest.raises(DataError, match=message) as caught:
        open_images(str(tmp_path / "x.tar"))
    assert "pack it again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tars_of_one_name(tmp_path: Path) -> None:
    for folder, name in (("a", "0.jpg"), ("b", "0.jpg"), ("c", "1.jpg")):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "x.tar", {name: JPEG})
    assert listed(tmp_path / "{a,c}/x.tar") == ["x.tar/0.jpg", "x.tar/1.jpg"]
    for pattern in ("{a,b}/x.tar", "{a,a}/x.tar"):
        with pytest.raises(DataError, match=r"x\.tar/0\.jpg is there twice, in tars of one name"):
            open_images(str(tmp_path / pattern))


def write_links(path: Path, links: list[tuple[bytes, str, str]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in ("blobs/1", "z.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(JPEG)
            tar.addfile(info, io.BytesIO(JPEG))
        for kind, name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    return path


def test_links_into_the_tar_are_read(tmp_path: Path) -> None:
    links = [
        *((tarfile.LNKTYPE, "s/a.jpg", "blobs/1"), (tarfile.LNKTYPE, "b.jpg", "./z.jpg")),
        *((tarfile.SYMTYPE, "s/c.jpg", "../blobs/1"), (tarfile.SYMTYPE, "latest", "nowhere")),
    ]
    source = open_images(str(write_links(tmp_path / "x.tar", links)))
    assert [source.key(index) for index in range(4)] == ["x.tar/z.jpg", "x.tar/s/a.jpg", "x.tar/b.jpg", "x.tar/s/c.jpg"]
    assert all(source.read(index) == JPEG for index in range(4))


@pytest.mark.parametrize(
    ("kind", "target", "word"),
    [
        (tarfile.LNKTYPE, "gone.jpg", "hard"),
        (tarfile.SYMTYPE, "../d/0.jpg", "symbolic"),
        (tarfile.SYMTYPE, "/etc/motd", "symbolic"),
    ],
)
def test_links_out_of_the_tar_are_refused(tmp_path: Path, kind: bytes, target: str, word: str) -> None:
    with pytest.raises(DataError, match=rf"x\.tar: a\.jpg is a {word} link to {target}, no file in this tar: pack the"):
        open_images(str(write_links(tmp_path / "x.tar", [(kind, "a.jpg", target)])))


def test_every_ending_is_of_a_format_that_is_opened(tmp_path: Path) -> None:
    formats = {"jp2": "JPEG2000", "j2k": "JPEG2000", "jpg": "JPEG", "tif": "TIFF", "pbm": "PPM", "avif": "AVIF"}
    picture = Image.fromarray(np.full((16, 20, 3), 90, np.uint8))
    opened = Image.registered_extensions()
    for ending in sorted(EXTENSIONS):
        kind = formats.get(ending) or opened[f".{ending}"]
        image = {"pfm": picture.convert("F"), "pbm": picture.convert("1")}.get(ending, picture)
        (tmp_path / f"{ending}.{ending}").write_bytes(encode(image, kind))
    source = open_images(str(tmp_path))
    assert len(source) == len(EXTENSIONS)
    for index in range(len(source)):
        assert decode(source.read(index)).size == (20, 16), source.key(index)


def test_what_is_not_opened_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, ["a.jpg", "b.HEIC", "c.heic", "Screenshot"])
    assert listed(tmp_path) == ["a.jpg"]
    assert passed(caplog) == "2 .heic, 1 without an ending"
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"no images in it, which holds 2 \.heic, 1 without an ending \(looked for \."):
        open_images(str(tmp_path))


def test_photos_in_the_root_and_in_folders(tmp_path: Path) -> None:
    """Enough for extraction; where classes are needed, the stray one is named."""
    fill(tmp_path, ["z.jpg", "cat/a.jpg", "dog/b.jpg"])
    source = open_images(str(tmp_path))
    assert [source.key(index) for index in range(3)] == ["cat/a.jpg", "dog/b.jpg", "z.jpg"]
    assert (source.kind, source.labels.tolist(), source.classes) == ("tree", [0, 1, -1], ("cat", "dog"))
    with pytest.raises(DataError, match=r"both in class folders and beside them \(z\.jpg\): move one kind away"):
        open_labelled("data.path", DataConfig(path=str(tmp_path)))


@pytest.mark.parametrize("kind", ["folders", "tars"])
def test_train_and_val_together_get_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    if kind == "folders":
        fill(tmp_path, ["train/cat/a.jpg", "val/cat/b.jpg"])
    else:
        write_tar(tmp_path / "train-0.tar", {"a.jpg": JPEG})
        write_tar(tmp_path / "val-0.tar", {"b.jpg": JPEG})
    assert len(open_images(str(tmp_path))) == 2
    assert "holds train and val, and all of it is taken" in caplog.text
    caplog.clear()
    open_images(str(tmp_path / ("train" if kind == "folders" else "train-0.tar")))
    fill(tmp_path / "other", ["trains/a.jpg", "valleys/b.jpg"])
    open_images(str(tmp_path / "other"))
    assert "all of it is taken" not in caplog.text


def test_a_link_to_a_folder_around_it(tmp_path: Path) -> None:
    fill(tmp_path / "set", ["cat/a.jpg"])
    (tmp_path / "set/dog").symlink_to(tmp_path / "set/cat")  # another folder: the user's own wish
    assert len(open_images(str(tmp_path / "set"))) == 2
    (tmp_path / "set/cat/all").symlink_to(tmp_path / "set")
    with pytest.raises(DataError, match=r"set/cat/all is a link to .*set, which holds it: remove the link"):
        open_images(str(tmp_path / "set"))


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(DataError, match=r"a\.jpg is a pipe, socket or device"):
        open_images(str(tmp_path))


def test_patterns_name_tars(tmp_path: Path) -> None:
    fill(tmp_path / "sets", ["a/0.jpg", "b/0.jpg"])
    with pytest.raises(DataError, match=r"a pattern names tars, and .*sets/a is a folder: give one folder"):
        open_images(str(tmp_path / "sets/*"))
    for name in ("a.tar.gz", "b.zip"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(DataError, match=r"not .*: unpack it to a plain tar"):
            open_images(str(tmp_path / name))
    write_tar(tmp_path / "a{1}.tar", {"a.jpg": JPEG})
    assert listed(tmp_path / "a{1}.tar") == ["a{1}.tar/a.jpg"]


def test_counts_are_kept_with_the_list(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MRMAE_LISTINGS", str(tmp_path / "kept"))
    monkeypatch.setattr("pipeline.data.listing_index.WORTH_KEEPING", 1)
    monkeypatch.setattr("pipeline.data.listing_index._QUIET", 0)
    fill(tmp_path / "set", ["a.jpg", "b.heic"])
    sources: list[ImageSource] = []
    for _ in range(2):
        sources.append(open_images(str(tmp_path / "set")))
        assert passed(caplog) == "1 .heic"
    assert sources[1].index
