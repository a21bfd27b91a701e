"""Parquet files of images: the same bytes as were written, a few blocks for each, and clear refusals."""

import contextlib
import importlib.util
import io
import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from pipeline.data.images import ImageSource, open_images
from pipeline.data.parquet import encoding, pages
from pipeline.data.parquet.files import list_parquet
from pipeline.errors import DataError
from tests.test_pipeline.data.test_images import JPEG, write_tar

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ["cat", "dog", "emu"]


def described(names: list[str] | None = None, image: str = "image", label: str = "label") -> dict[str, str]:
    """A schema's metadata as the library datasets writes it."""
    features = {image: {"_type": "Image"}, label: {"names": names or NAMES, "_type": "ClassLabel"}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def write(path: Path, images: list[bytes | None], metadata: dict[str, str] | None = None, **options: Any) -> Path:
    rows = [{"bytes": image, "path": f"pictures/{row}.jpg"} for row, image in enumerate(images)]
    labels = pa.array([row % 3 for row in range(len(images))])
    table = pa.table({"image": pa.array(rows, STRUCT), "label": labels})
    parquet.write_table(table.replace_schema_metadata(metadata or described()), path, **{"row_group_size": 4} | options)
    return path


def picture(number: int, size: int = 0) -> bytes:
    """An image file, with so many bytes behind it."""
    buffer = io.BytesIO()
    Image.new("RGB", (8 + number, 9), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue() + np.random.default_rng(number).bytes(size)


def read_all(images: ImageSource) -> list[bytes]:
    return [images.read(index) for index in range(len(images))]


@pytest.mark.parametrize(
    "options",
    [
        {}, {"use_dictionary": False}, {"data_page_version": "2.0"}, {"compression": "none"}, {"compression": "zstd"},
        {"compression": "gzip", "use_dictionary": False}, {"write_page_index": True, "data_page_size": 100},
        {"row_group_size": 100}, {"use_dictionary": False, "data_page_version": "2.0", "compression": "none"},
    ],
    ids=str,
)  # fmt: skip
def test_images_are_what_was_written(options: dict[str, Any], tmp_path: Path) -> None:
    contents = [picture(number, 30_000) for number in (*range(6), 2, 0)]  # of which some are the same
    write(tmp_path / "train-0.parquet", contents[:5], **options)
    write(tmp_path / "train-1.parquet", contents[5:], **options)
    images = open_images(str(tmp_path))
    assert (images.kind, images.num_classes, images.classes) == ("parquet", 3, tuple(NAMES))
    assert read_all(images) == contents
    assert images.ends(3, 4) == (len(contents[3]), contents[3][:4], contents[3][-4:])
    assert [images.key(index) for index in (0, 4, 5)] == [
        "train-0.parquet/0/0.jpg", "train-0.parquet/4/4.jpg", "train-1.parquet/0/0.jpg",
    ]  # fmt: skip
    assert images.labels.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    for pattern in ("train-*.parquet", "train-{0..1}.parquet"):
        assert open_images(str(tmp_path / pattern)).digest() == images.digest()
    chosen = images.select(np.array([6, 1]))
    assert read_all(chosen) == [contents[6], contents[1]]


def test_an_image_takes_the_blocks_that_hold_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand images in row groups of 500, each one page of 2 MB: no more than two blocks of 64 KiB are read."""
    contents = [np.random.default_rng(number).bytes(4000 + number) for number in range(1000)]
    images = open_images(str(write(tmp_path / "a.parquet", contents, row_group_size=500)))
    assert len(images.pages) == 2
    read, sizes = pages._read, list[int]()

    def counted(path: str, start: int, length: int) -> bytes:
        sizes.append(length)
        return read(path, start, length)

    monkeypatch.setattr(pages, "_read", counted)
    for index in np.random.default_rng(0).permutation(1000).tolist():
        assert images.read(index) == contents[index]
    assert len(sizes) == 1000
    assert max(sizes) <= 2 * (1 << 16) + 200


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 150_000), st.booleans()), min_size=1, max_size=5), st.integers(0, 2**32))
def test_any_snappy_page_gives_its_values(parts: list[tuple[int, bool]], seed: int) -> None:
    """Noise and what compresses well, side by side."""
    random = np.random.default_rng(seed)
    values = [random.bytes(size) if is_noise else bytes([seed % 256]) * size for size, is_noise in parts]
    content = b"".join(values)
    stored = pa.compress(content, "snappy", asbytes=True)
    starts = encoding.snappy_blocks(stored, len(content))
    if starts is not None:
        assert len(starts) == -(-len(content) // (1 << 16)) + 1
        sizes = [min(1 << 16, len(content) - place) for place in range(0, len(content), 1 << 16)]
        for number, size in enumerate(sizes):
            block = encoding.varint_bytes(size) + stored[starts[number] : starts[number + 1]]
            place = number << 16
            assert pages._decompress(block, size, 1) == content[place : place + size]


def test_a_snappy_page_of_other_blocks_is_unpacked_whole() -> None:
    """One literal of 70,000 bytes, as no usual encoder makes."""
    content = bytes(70_000)
    stored = encoding.varint_bytes(70_000) + b"\xf8" + (69_999).to_bytes(3, "little") + content
    assert pa.decompress(stored, 70_000, "snappy", asbytes=True) == content
    assert encoding.snappy_blocks(stored, 70_000) is None


def test_columns_are_found_by_the_metadata(tmp_path: Path) -> None:
    table = pa.table({"photo": pa.array([JPEG, JPEG]), "kind": pa.array([2, None], pa.int32())})
    metadata = described(image="photo", label="kind")
    parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    images = open_images(str(tmp_path / "a.parquet"))
    assert (images.classes, images.labels.tolist()) == (tuple(NAMES), [2, -1])
    assert images.key(1) == "a.parquet/1"
    assert read_all(images) == [JPEG, JPEG]


def test_columns_are_found_by_their_names(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"image": [JPEG], "label": ["cat"]}), tmp_path / "a.parquet")
    images = open_images(str(tmp_path / "a.parquet"))
    assert (images.classes, images.labels.tolist(), images.text_class) == ((), [-1], "column label of a.parquet")
    parquet.write_table(pa.table({"image": [JPEG]}), tmp_path / "a.parquet")
    assert open_images(str(tmp_path / "a.parquet")).labels.tolist() == [-1]


def refused(path: Path, line: str) -> None:
    with pytest.raises(DataError, match=line) as caught:
        open_images(str(path))
    assert "\n" not in str(caught.value)


def test_files_that_hold_no_images_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["a"], "label": [1]}), file)
    refused(file, r"a\.parquet is not a parquet file of images .*: it has columns text, label, and none of images")
    parquet.write_table(pa.table({"image": [[JPEG, JPEG]]}), file)
    refused(file, r"column image is list<.*>, and no bytes of images")
    parquet.write_table(pa.table({"image": [1, 2]}), file)
    refused(file, r"column image is INT64, and no bytes of one image a row")
    write(file, [JPEG, None])
    refused(file, r"a row has no image bytes, but a path at most: write it again with the images in it")
    write(file, [JPEG, None], use_dictionary=False, data_page_version="2.0")
    refused(file, r"a row has no image bytes")
    write(file, [JPEG] * 3, use_dictionary=False, column_encoding={"image.bytes": "DELTA_LENGTH_BYTE_ARRAY"})
    refused(file, r"encoding 6, which is not read: write it again with PLAIN")
    write(file, [JPEG], compression="lz4")
    refused(file, r"compression LZ4.* is not read: write it again with SNAPPY")
    file.write_bytes(file.read_bytes()[:-20])
    refused(file, r"a\.parquet is not a parquet file of images that can be read: ")
    file.write_bytes(b"")
    refused(file, r"a\.parquet is not a parquet file of images that can be read: ")


def test_no_byte_of_a_footer_ends_the_process(tmp_path: Path) -> None:
    """Each byte of it changed: a line or a list. pyarrow's own accessors abort at an unknown codec."""
    file = write(tmp_path / "a.parquet", [JPEG] * 2)
    content = file.read_bytes()
    size = int.from_bytes(content[-8:-4], "little") + 8

    def list_each() -> None:
        for place in range(len(content) - size, len(content)):
            file.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
            with contextlib.suppress(DataError):
                list_parquet([str(file)])

    process = multiprocessing.get_context("fork").Process(target=list_each)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_sets_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [JPEG])
    write(tmp_path / "b.parquet", [JPEG], described(["cat", "dog", "yak"]))
    refused(tmp_path, r"b\.parquet has other classes than .*a\.parquet: name files of one data set")
    write_tar(tmp_path / "c.tar", {"a.jpg": JPEG})
    refused(tmp_path / "{a.parquet,c.tar}", r"\.tar and \.parquet files side by side: name one kind by a pattern")
    (tmp_path / "d.jpg").write_bytes(JPEG)
    refused(tmp_path, r"tars \(c\.tar\) and images \(d\.jpg\) side by side")


def test_a_copy_from_an_earlier_block_is_no_stream_of_blocks() -> None:
    """The format allows it, though its usual writer packs each 64 KiB for itself."""
    block = bytes(encoding.BLOCK)
    size = encoding.varint_bytes(len(block) + 4)
    head = size + bytes([61 << 2]) + (len(block) - 1).to_bytes(2, "little") + block
    literal, copy = bytes([3 << 2]) + b"abcd", bytes([3 << 2 | 2]) + (4).to_bytes(2, "little")
    assert encoding.snappy_blocks(head + literal, len(block) + 4) == [len(size), len(head), len(head + literal)]
    assert encoding.snappy_blocks(head + copy, len(block) + 4) is None


def test_tables_beside_tars_or_images_are_passed_over(tmp_path: Path) -> None:
    """img2dataset writes a table beside each tar, and folders of images come with a metadata.parquet."""
    for folder in ("tars", "images"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "0.parquet", [JPEG] * 3)
    write_tar(tmp_path / "tars/0.tar", {"a.jpg": JPEG})
    (tmp_path / "images/cat").mkdir()
    (tmp_path / "images/cat/a.jpg").write_bytes(JPEG)
    for folder, kind in (("tars", "tar"), ("images", "tree")):
        source = open_images(str(tmp_path / folder))
        assert (source.kind, len(source)) == (kind, 1)


@pytest.mark.parametrize(
    "features",
    [
        {"objects": {"bbox": {"_type": "Sequence"}}},
        {"boxes": [{"_type": "Value"}]},
        {"label": {"_type": "ClassLabel", "names": None}},
        None,
    ],
)
def test_metadata_of_other_columns_are_no_fault(tmp_path: Path, features: Any) -> None:
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    write(tmp_path / "a.parquet", [JPEG], metadata)
    assert len(open_images(str(tmp_path / "a.parquet"))) == 1
    write(tmp_path / "b.parquet", [JPEG], {"huggingface": "{"})
    refused(tmp_path / "b.parquet", "its Hugging Face metadata are no JSON")


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.parquet", [JPEG])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(tmp_path, r"a\.parquet: parquet files need pyarrow: pip install -e '\.\[parquet\]'")


@pytest.mark.parametrize("compression", ["snappy", "zstd"])
def test_damage_behind_the_list_is_named(compression: str, tmp_path: Path) -> None:
    contents = [np.random.default_rng(number).bytes(100_000) for number in range(3)]
    file = write(tmp_path / "a.parquet", contents, compression=compression)
    images = open_images(str(file))
    data = bytearray(file.read_bytes())
    start = int(images.pages[0, 1])
    data[start : start + 8] = bytes(8) if compression == "zstd" else b"\xff" * 8
    file.write_bytes(data)
    pages._whole_page.cache_clear()
    with pytest.raises(
        DataError, match=r"image a\.parquet/0/0\.jpg: a page is damaged \(.*\): fetch .*a\.parquet again"
    ):
        images.read(0)


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False, "compression": "none"}], ids=str)
def test_no_byte_of_a_page_can_make_it_crash(options: dict[str, Any], tmp_path: Path) -> None:
    """Bytes of headers, levels, dictionaries and images changed, one at a time: a line, or another image."""
    file = write(tmp_path / "a.parquet", [picture(number) for number in range(4)], **options)
    whole = file.read_bytes()
    size = parquet.ParquetFile(file).metadata.row_group(0).column(0).total_compressed_size
    for place in range(4, 4 + size, 11):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with contextlib.suppress(DataError):
            read_all(open_images(str(file)))
