"""The files are what docs/cache-format.md says: others read them without us."""

import io
import json
import re
import tarfile
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import webdataset
import zarr
from PIL import Image

from pipeline.cache import create_cache, open_cache, open_writer, read_header
from pipeline.cache.tar.store import member_header
from tests.test_pipeline.cache.samples import STORES, SUMMARIES, make_cache, make_header, make_shard

# webdataset leaves an open tar to the garbage collector
LEFT_OPEN = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
DOCS = Path(__file__).parents[3] / "docs" / "cache-format.md"


@pytest.mark.parametrize("quantiser", ["int8", "int4", "codes"])
def test_zarr_alone_reads_it(tmp_path: Path, quantiser: str) -> None:
    path = make_cache(tmp_path / "cache", make_header("zarr", quantiser_name=quantiser), {5: "bad"})
    group, reader = zarr.open_group(path, mode="r"), open_cache(path)
    for index in (0, 4, 9):
        for view in (0, 1):
            record = reader.read(index, view)
            np.testing.assert_array_equal(group["tokens"][index, view], record.tokens)  # type: ignore[index]
            if record.scale is not None:
                np.testing.assert_array_equal(group["scale"][index, view], record.scale)  # type: ignore[index]
            np.testing.assert_array_equal(group["attention"][index, view], record.attention)  # type: ignore[index]
            assert str(group["key"][index]) == record.key  # type: ignore[index]


@LEFT_OPEN
@pytest.mark.parametrize("quantiser", ["int8", "int4", "codes"])
@pytest.mark.parametrize("attention", ["mean", "heads", "none"])
def test_webdataset_alone_reads_it(tmp_path: Path, attention: str, quantiser: str) -> None:
    header = make_header("webdataset", attention=attention, heads=2, dim=10, grid=[3, 1], quantiser_name=quantiser)
    path = make_cache(tmp_path / "cache", header, {5: "bad"})
    reader = open_cache(path)
    samples = list(webdataset.WebDataset(str(path / "shards" / "000001-01.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["000000004", "000000006", "000000007"]
    for sample in samples:
        record = reader.read(int(sample["__key__"]), 1)
        tensors = safetensors.numpy.load(sample["safetensors"])
        kept = {"tokens": record.tokens, "scale": record.scale, "attention": record.attention}
        kept = {name: array for name, array in kept.items() if array is not None}
        assert tensors.keys() == kept.keys()
        for name, array in kept.items():
            np.testing.assert_array_equal(tensors[name], array)
        assert safetensors.torch.load(sample["safetensors"])["tokens"].shape == (3, header.stored_dim)
        facts = json.loads(sample["json"])
        assert facts["key"] == record.key
        assert facts["box"] == record.box.tolist()
        assert facts["source_hash"] == record.source_hash
        assert sample["jpg"] == record.image


def test_tars_are_plain_and_say_nothing_of_the_machine(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache", make_header("webdataset"))
    with tarfile.open(path / "shards" / "000000-00.tar", "r:") as tar:
        members = tar.getmembers()
    assert [m.name for m in members[:3]] == ["000000000.jpg", "000000000.safetensors", "000000000.json"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


@pytest.mark.parametrize(
    ("name", "size"), [("000000000.jpg", 0), ("123456789.safetensors", 8**11 - 1), ("7.json", 511)]
)
def test_member_headers_are_those_of_tarfile(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    assert member_header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_a_raw_chunk_is_the_array_and_its_crc32c(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache", make_header("zarr"))
    content = (path / "tokens" / "c.2.1.0.0").read_bytes()
    tokens = np.frombuffer(content[:-4], np.int8).reshape(4, 6, 8)
    np.testing.assert_array_equal(tokens[1], open_cache(path).read(9, 1).tokens)
    assert (tokens[2:] == 0).all()  # the last shard is padded
    assert google_crc32c.value(content[:-4]) == int.from_bytes(content[-4:], "little")


def test_the_record_checksum_is_as_documented(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache", make_header("zarr"))
    header, record = read_header(path), open_cache(path).read(6, 1)
    parts = [
        bytes.fromhex(header.fingerprint),
        (6).to_bytes(8, "little"),
        (1).to_bytes(4, "little"),
        record.key.encode(),
        record.box.astype("<i4").tobytes(),
        bytes([record.hflip]),
        record.source_hash.to_bytes(8, "little"),
        record.tokens.tobytes(),
        record.scale.tobytes() if record.scale is not None else b"",
        record.attention.tobytes() if record.attention is not None else b"",
    ]
    stored = zarr.open_group(path, mode="r")["crc32c"][6, 1]  # type: ignore[index]
    assert google_crc32c.value(b"".join(parts)) == stored


@LEFT_OPEN
def test_webdataset_decodes_the_images(tmp_path: Path) -> None:
    header = make_header("webdataset")
    create_cache(tmp_path / "cache", header)
    data = make_shard(header, 0)
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 10, 30)).save(buffer, "JPEG")
    data.images = [[buffer.getvalue()] * 2 for _ in range(4)]
    open_writer(tmp_path / "cache").write_shard(0, data)

    def tensors(key: str, content: bytes) -> object:
        return safetensors.numpy.load(content) if key == ".safetensors" else None

    tars = str(tmp_path / "cache" / "shards" / "000000-{00..01}.tar")
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8", tensors))
    assert len(samples) == 8
    assert samples[5]["jpg"].shape == (32, 32, 3)
    assert samples[5]["safetensors"]["tokens"].shape == (6, 8)
    assert samples[5]["json"]["key"] == open_cache(tmp_path / "cache").read(1, 0).key


@LEFT_OPEN
@pytest.mark.parametrize("summary", SUMMARIES)
@pytest.mark.parametrize("store", STORES)
def test_the_documented_example_runs(
    tmp_path: Path, store: str, summary: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each example of the document uses one library alone and prints dequantised tokens of a record."""
    path = make_cache(tmp_path / "cache", make_header(store, summary=summary))
    monkeypatch.chdir(tmp_path)
    names = run_example(f"import {store}")
    np.testing.assert_allclose(names["tokens"], open_cache(path).read(0, 0, dequantise=True).tokens, rtol=1e-5)


def test_the_documented_class_token_is_read_by_numpy_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_cache(tmp_path / "cache", make_header("zarr", summary="class"))
    monkeypatch.chdir(tmp_path)
    summary = open_cache(path).read(0, 0, dequantise=True).summary
    np.testing.assert_allclose(run_example("import numpy")["summary"], summary[0], rtol=1e-5)


def run_example(library: str) -> dict[str, object]:
    """The document's example that imports a library; returns its names."""
    examples = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    example = next(e for e in examples if library in e)
    assert "pipeline" not in example
    assert len(example.strip().splitlines()) <= 15
    names: dict[str, object] = {}
    exec(example, names)
    return names


def test_numpy_alone_reads_codes_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    (example,) = (e for e in examples if "centroids" in e)
    assert set(re.findall(r"(?:import|from) (\w+)", example)) == {"base64", "json", "pathlib", "numpy", "Path"}
    path = make_cache(tmp_path / "cache", make_header("zarr", quantiser_name="codes"))
    monkeypatch.chdir(tmp_path)
    for index, view in ((0, 0), (6, 1)):
        names: dict[str, object] = {}
        exec(example.replace("view = rows * columns, 0, 0", f"view = rows * columns, {index}, {view}"), names)
        reader = open_cache(path)
        np.testing.assert_array_equal(names["codes"], reader.read(index, view).tokens[:, 0])
        np.testing.assert_allclose(names["tokens"], reader.read(index, view, dequantise=True).tokens, rtol=1e-6)


@pytest.mark.parametrize(("dim", "summary"), [(8, None), (22, None), (8, "class")])
def test_numpy_alone_reads_int4_as_documented(
    tmp_path: Path, dim: int, summary: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    (example,) = (e for e in examples if "levels" in e)
    assert set(re.findall(r"(?:import|from) (\w+)", example)) == {"json", "pathlib", "numpy", "Path"}
    path = make_cache(tmp_path / "cache", make_header("zarr", quantiser_name="int4", dim=dim, summary=summary))
    assert "first, 0, 0" in example
    monkeypatch.chdir(tmp_path)
    for index, view in ((0, 0), (6, 1)):
        names: dict[str, object] = {}
        exec(example.replace("first, 0, 0", f"first, {index}, {view}"), names)
        expected = open_cache(path).read(index, view, dequantise=True).tokens
        np.testing.assert_allclose(names["tokens"], expected, rtol=1e-4, atol=1e-4)
