import errno
import io
import os
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline.data.decoding import decode, decode_pixels
from pipeline.data.images import ImageSource, open_images
from pipeline.errors import DataError, StorageError
from tests.pictures import smooth_picture


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


JPEG = encode(Image.new("RGB", (20, 10), (200, 30, 30)), "JPEG")


def test_class_tree(image_tree: Path) -> None:
    images = open_images(str(image_tree))
    assert (images.kind, len(images), images.num_classes) == ("tree", 24, 3)
    assert images.classes == ("class0", "class1", "class2")
    assert images.key(0) == "class0/00.jpg"
    assert images.read(0) == (image_tree / "class0/00.jpg").read_bytes()
    assert [images.label(i) for i in range(24)] == [0] * 8 + [1] * 8 + [2] * 8


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.JPG", "notes.txt", ".hidden.jpg"):
        (tmp_path / name).write_bytes(JPEG)
    images = open_images(str(tmp_path))
    assert (images.kind, [images.key(i) for i in range(2)], images.num_classes) == ("flat", ["a.JPG", "b.jpg"], 0)


@pytest.mark.parametrize("pattern", ["{dir}/x-{{0..1}}.tar", "{dir}/x-*.tar", "{dir}"])
def test_tars(tmp_path: Path, pattern: str) -> None:
    write_tar(tmp_path / "x-0.tar", {"a.jpg": JPEG, "a.cls": b"3", "b.cls": b"1", "b.jpg": JPEG + b"tail"})
    write_tar(tmp_path / "x-1.tar", {"a.jpg": JPEG})
    images = open_images(pattern.format(dir=tmp_path))
    assert [images.key(i) for i in range(3)] == ["x-0.tar/a.jpg", "x-0.tar/b.jpg", "x-1.tar/a.jpg"]
    assert [images.label(i) for i in range(3)] == [3, 1, -1]
    assert images.read(1) == JPEG + b"tail"


def test_limit_spreads_over_the_whole(image_tree: Path) -> None:
    images = open_images(str(image_tree), limit=6)
    assert [images.label(i) for i in range(6)] == [0, 0, 1, 1, 2, 2]


def test_digest_knows_keys_and_lengths(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG)
    before = open_images(str(tmp_path)).digest()
    assert before == open_images(str(tmp_path)).digest()
    (tmp_path / "a.jpg").write_bytes(JPEG + b"x")
    longer = open_images(str(tmp_path)).digest()
    (tmp_path / "a.jpg").rename(tmp_path / "b.jpg")
    assert len({before, longer, open_images(str(tmp_path)).digest()}) == 3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text("aé漢/.", min_size=1, max_size=9), st.integers(0, 2**40)), min_size=1, max_size=40))
def test_the_digest_is_the_one_that_caches_hold(rows: list[tuple[str, int]]) -> None:
    """Each key, a zero byte and the length in eight bytes, one after the other."""
    hasher = xxhash.xxh3_128()
    for key, length in rows:
        hasher.update(key.encode() + b"\0" + length.to_bytes(8, "little"))
    keys = np.array([key.encode() for key, _ in rows])
    lengths = np.array([length for _, length in rows])
    source = ImageSource("flat", "", (), keys, lengths, np.full(len(rows), -1), np.empty((0, 2), np.int64), ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.data.images._DIGEST_ROWS", 7)
        assert source.digest() == hasher.hexdigest()
    assert source.select(np.arange(len(rows))).digest() == hasher.hexdigest()


def test_keys_are_sorted_as_a_whole(tmp_path: Path) -> None:
    """Not folder by folder: a-b/1 comes before a/1, and images of one class may lie at several depths."""
    names = ["a/1.jpg", "a-b/1.jpg", "a/1/2.jpg", "é/1.jpg", "a/10.jpg", "Z/1.jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    images = open_images(str(tmp_path))
    assert [images.key(index) for index in range(len(names))] == sorted(names)
    assert images.classes == ("Z", "a", "a-b", "é")
    assert [images.classes[images.label(index)] for index in range(len(names))] == [
        name.split("/")[0] for name in sorted(names)
    ]
    assert images.lengths.tolist() == [len(name.encode()) for name in sorted(names)]


def test_a_class_that_is_no_number_does_no_harm_where_none_is_asked_for(tmp_path: Path) -> None:
    members = {"a.jpg": JPEG, "a.cls": b"tabby", "b.jpg": JPEG, "b.cls": b" 7\n", "c.cls": b"9" * 300, "c.jpg": JPEG}
    images = open_images(str(write_tar(tmp_path / "x.tar", members)))
    assert images.labels.tolist() == [-1, 7, -1]
    assert images.text_class == "x.tar/a.cls"


@pytest.mark.parametrize("image", ["a.jpg", "class/a.JPEG"])
def test_tars_beside_images_are_refused_unless_a_pattern_names_them(tmp_path: Path, image: str) -> None:
    with tarfile.open(tmp_path / "left-over.tar", "w") as tar:
        member = tarfile.TarInfo("b.jpg")
        member.size = len(JPEG)
        tar.addfile(member, io.BytesIO(JPEG))
    (tmp_path / "val").mkdir()  # other sub-folders don't matter
    (tmp_path / "val/more.tar").write_bytes(b"")
    assert len(open_images(str(tmp_path))) == 1
    (tmp_path / image).parent.mkdir(exist_ok=True)
    (tmp_path / image).write_bytes(JPEG)
    with pytest.raises(DataError, match=rf"tars \(left-over\.tar\) and images \({image}\) side by side"):
        open_images(str(tmp_path))
    assert len(open_images(str(tmp_path / "*.tar"))) == 1


@pytest.mark.parametrize("path", ["absent", "absent-{0..3}.tar", "empty", "file.txt", "torn.tar", "a{b", "*"])
def test_what_cannot_be_listed(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("no image")
    (tmp_path / "torn.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(DataError, match=r"data\.path"):
        open_images(str(tmp_path / path))


def test_a_link_to_nowhere_is_an_image_that_can_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "b.jpg").symlink_to(tmp_path / "absent.jpg")
    images = open_images(str(tmp_path))
    assert [images.key(index) for index in range(2)] == ["a.jpg", "b.jpg"]
    with pytest.raises(DataError, match=r"image b\.jpg: No such file"):
        images.read(1)


def test_an_image_that_went_away(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "b.jpg").write_bytes(JPEG)
    images = open_images(str(tmp_path))
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"a\.jpg"):
        images.read(0)


RED = (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (encode(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG", quality=100), RED),
        (encode(Image.new("L", (4, 4), 100), "PNG"), (100, 100, 100)),
        (encode(Image.new("RGB", (4, 4), RED).convert("P"), "PNG"), RED),
        (encode(Image.new("RGBA", (4, 4), (*RED, 128)), "PNG"), RED),
        (encode(Image.fromarray(np.full((4, 4), 0x64FF, np.uint16)), "PNG"), (100, 100, 100)),
        (encode(Image.new("1", (4, 4), 1), "PNG"), (255, 255, 255)),
        (encode(Image.new("RGB", (4, 4), RED), "WEBP", lossless=True), RED),
    ],
    ids=["cmyk", "grey", "palette", "alpha", "16-bit", "bilevel", "webp"],
)
def test_photos_in_the_wild(data: bytes, colour: tuple[int, int, int]) -> None:
    image = decode(data)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - colour).max() <= 2


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90° clockwise
    left_red = Image.new("RGB", (20, 10))
    left_red.paste(RED, (0, 0, 10, 10))
    image = decode(encode(left_red, "PNG", exif=exif))
    assert image.size == (10, 20)
    assert image.getpixel((5, 2)) == RED
    assert image.getpixel((5, 17)) == (0, 0, 0)


def test_truncated_and_huge_images(monkeypatch: pytest.MonkeyPatch) -> None:
    big = encode(Image.effect_noise((64, 64), 50), "PNG")
    photo = encode(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
    progressive = encode(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG", progressive=True)
    for whole in (big, photo, progressive):
        for share in (0.3, 0.6, 0.95):  # of which the last two end in the middle of the pixels
            with pytest.raises(DataError, match="not a readable image"):
                decode(whole[: int(share * len(whole))])
    monkeypatch.setattr("pipeline.data.decoding._BOMB_PIXELS", 1000)
    with pytest.raises(DataError, match="64x64 pixels"):
        decode(big)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on odd EXIF data
@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", JPEG[:30], b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF", b"II*\0"]))
def test_arbitrary_bytes_are_an_error_and_never_a_crash(data: bytes, head: bytes) -> None:
    try:
        mode = decode(head + data).mode
    except DataError as error:
        mode = "RGB" if len(str(error).splitlines()) == 1 else "more than one line"
    assert mode == "RGB"


def decoded_into(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    out = np.empty((image.height, image.width, 3), np.uint8)
    decode_pixels(data, out)
    return out


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("options", [
    {"quality": 95, "subsampling": 0}, {"quality": 75}, {"quality": 30, "subsampling": 1}, {"progressive": True},
    {"optimize": True, "subsampling": 2}, {"restart_marker_rows": 1},
])  # fmt: skip
@pytest.mark.parametrize("size", [(224, 224), (37, 51), (1, 1), (8, 17)])
def test_the_fast_decoder_gives_pillows_pixels(options: dict[str, object], size: tuple[int, int]) -> None:
    random = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), np.uint8)
    for image in (Image.fromarray(random), smooth_picture(1, *size)):
        data = encode(image, "JPEG", **options)
        assert np.array_equal(np.asarray(decode(data)), pillow(data))
        assert np.array_equal(decoded_into(data), pillow(data))


def test_the_fast_decoder_gives_pillows_pixels_of_photos(real_data: Path) -> None:
    photos = open_images(str(real_data / "imagenette224/train-00000.tar"), limit=100)
    scenes = open_images(str(real_data / "coco128/images/train2017"), limit=20)
    for source in (photos, scenes):
        for index in range(len(source)):
            assert np.array_equal(decoded_into(source.read(index)), pillow(source.read(index))), source.key(index)


def test_what_the_fast_decoder_finds_irregular_pillow_decides() -> None:
    """Stray bytes before a marker: photo collections have them, and Pillow reads on."""
    data = encode(smooth_picture(3, 40, 40), "JPEG")
    at = data.index(b"\xff\xda")
    stray = data[:at] + b"\x00\x00" + data[at:]
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(stray, "RGB")
    assert np.array_equal(np.asarray(decode(stray)), pillow(data))
    out = np.empty((40, 40, 3), np.uint8)
    decode_pixels(stray, out)
    assert np.array_equal(out, pillow(data))
    with pytest.raises(DataError, match="40x40 pixels where 32x40 belong"):
        decode_pixels(data, np.empty((32, 40, 3), np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_jpegs_come_upright_whatever_decodes_them(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(smooth_picture(4, 24, 24), "JPEG", exif=exif, quality=95)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.array_equal(np.asarray(decode(data)), expected)
    assert np.array_equal(decoded_into(data), expected)


@pytest.mark.parametrize(
    "data", [b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\x00\x00" * 9, b"\xff\xd8\xff\xe1\x00\x02"]
)
def test_the_beginning_of_a_jpeg_is_none(data: bytes) -> None:
    with pytest.raises(DataError, match="not a readable image"):
        decode(data)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("kind", ["tree", "tar"])
def test_a_disk_that_fails_for_a_moment_is_asked_again(
    image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: str
) -> None:
    """Three failures in a row pass, a fourth stops the run and names the image: it is no lost image."""
    source = open_images(str(image_tree if kind == "tree" else write_tar(tmp_path / "x.tar", {"a.jpg": JPEG})))
    pauses: list[float] = []
    failures = iter([True, True, True])
    read_bytes, pread = Path.read_bytes, os.pread

    def fail_sometimes() -> None:
        if next(failures, False):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(Path, "read_bytes", lambda path: (fail_sometimes(), read_bytes(path))[1])
    monkeypatch.setattr(os, "pread", lambda *arguments: (fail_sometimes(), pread(*arguments))[1])
    assert decode(source.read(0)).size
    assert pauses == [0.1, 0.4, 1.6]
    failures = iter([True] * 4)
    with pytest.raises(StorageError, match=rf"^image .*{source.key(0)}: .*, 4 times: mend the disk or network"):
        source.read(0)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EISDIR])
def test_a_file_that_is_gone_is_not_asked_for_again(
    image_tree: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(path: Path) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "read_bytes", fail)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waited"))
    with pytest.raises(DataError, match=r"image class0/00\.jpg"):
        open_images(str(image_tree)).read(0)


@pytest.mark.parametrize("content", [bytes(100), JPEG[:40], b"GIF89a"])
def test_the_same_bytes_fail_with_the_same_words(content: bytes) -> None:
    """They go into commit records, which must not depend on who wrote them."""
    words, kept = set(), []
    for _ in range(3):
        with pytest.raises(DataError) as caught:
            decode(content)
        kept.append(caught.value)  # keeps Pillow's buffers alive, so that their addresses differ
        words.add(str(caught.value))
    assert len(words) == 1
    assert "0x" not in words.pop()


def test_formats_that_a_decoder_gives_up_on_are_unreadable_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's decoders also raise RuntimeError, and NotImplementedError for variants that they don't know."""

    def refuse(*_args: object, **_keys: object) -> Any:
        raise NotImplementedError("pixel format unimplemented")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(DataError, match="not a readable image: pixel format unimplemented"):
        decode(b"DDS ")


def test_a_file_name_that_is_no_utf_8(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    with pytest.raises(DataError, match=r"file name 'caf\\udce9\.png' is no UTF-8, as keys are: rename it"):
        open_images(str(tmp_path))
