"""Arbitrary bytes where a file of the cache should be: a clear error, never a crash, and nothing is executed."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.cache import CacheHeader, Quantiser, ShardData, create_cache, open_cache, open_writer, verify
from pipeline.cache.format.commits import Commit
from pipeline.errors import CacheDamage
from tests.test_pipeline.cache.samples import STORES, SUMMARIES, make_cache, make_header

QUICKLY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
KEYS = ["format", "version", "store", "dataset", "teacher", "views", "quantiser", "fingerprint", "samples_per_shard"]


@pytest.fixture(scope="module", params=STORES)
def intact(request: pytest.FixtureRequest) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield make_cache(Path(folder) / "cache", make_header(request.param, summary="class"))


def must_be_found(path: Path, file: Path, content: bytes) -> None:
    """Put `content` in place of a file: verification reports it, reading raises CacheDamage or isn't touched by it."""
    before = file.read_bytes()
    if content == before:
        return
    file.write_bytes(content)
    try:
        assert not verify(path, "full").sound
        with contextlib.suppress(CacheDamage):
            reader = open_cache(path)
            for index in range(len(reader)):
                reader.read(index, 0)
                reader.read(index, 1)
    finally:
        file.write_bytes(before)


@QUICKLY
@given(content=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
@example(content=b"[" * 100_000)
@example(content=b'{"fingerprint": 3}')
@example(content=b"\xff\xfe")
def test_any_bytes_as_header(content: bytes) -> None:
    with pytest.raises(CacheDamage):
        CacheHeader.from_bytes(content)


@QUICKLY
@given(key=st.sampled_from(KEYS), value=JSON)
def test_any_value_in_a_header(key: str, value: Any) -> None:
    fields = make_header().to_json() | {key: value}
    if fields == make_header().to_json():
        return
    with pytest.raises(CacheDamage):
        CacheHeader.from_bytes(json.dumps(fields, sort_keys=True, indent=1).encode())


@QUICKLY
@given(content=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
@example(content=b"[" * 100_000)
@example(content=b'{"digest": ""}')
def test_any_bytes_as_commit(content: bytes) -> None:
    with pytest.raises(ValueError):
        Commit.from_bytes(content)


@settings(QUICKLY, max_examples=25)
@given(data=st.data())
def test_any_bytes_as_any_file(intact: Path, data: st.DataObject) -> None:
    files = sorted(f.relative_to(intact).as_posix() for f in intact.rglob("*") if f.is_file())
    must_be_found(intact, intact / data.draw(st.sampled_from(files)), data.draw(st.binary(max_size=2000)))


@settings(QUICKLY, max_examples=40)
@given(data=st.data())
def test_any_edit_of_any_file(intact: Path, data: st.DataObject) -> None:
    """A few bytes replaced, so that most of the structure still parses."""
    files = sorted(f.relative_to(intact).as_posix() for f in intact.rglob("*") if f.is_file())
    file = intact / data.draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    piece = data.draw(st.binary(min_size=1, max_size=12))
    content[at : at + len(piece)] = piece
    must_be_found(intact, file, bytes(content))


@settings(deadline=None, max_examples=25)
@given(
    store=st.sampled_from(STORES),
    n=st.integers(1, 4),
    V=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    D=st.integers(1, 9),
    heads=st.integers(0, 2),
    name=st.sampled_from(["int8", "int4", "float16", "float32"]),
    summary=st.sampled_from(SUMMARIES),
    seed=st.integers(0, 2**32),
    keys=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=300), min_size=4, max_size=4),
)
def test_records_round_trip_for_any_shape(
    store: str, n: int, V: int, grid: tuple[int, int], D: int, heads: int, name: str, summary: str | None, seed: int,
    keys: list[str],
) -> None:  # fmt: skip
    random = np.random.default_rng(seed)
    D += D % 2 if name == "int4" else 0
    flat = np.ones(D, np.float32)
    quantiser = Quantiser(name, flat, flat).to_json()
    R = grid[0] * grid[1] + bool(summary)
    header = make_header(
        store,
        dataset={"source": "", "kind": "", "count": n, "digest": ""},
        teacher={"grid": list(grid), "dim": D},
        views={"count": V, "seed": 0, "image_size": 8},
        quantiser=quantiser | {f"summary_{key}": quantiser[key] for key in ("mean", "std") if key in quantiser},
        summary=summary,
        attention="heads" if heads else "mean",
        heads=heads,
    )
    shape = header.attention_shape
    assert shape is not None
    images: list[list[bytes] | None]
    images = [[random.bytes(int(random.integers(1, 1500))) for _ in range(V)] for _ in range(n)]
    data = ShardData(
        tokens=random.integers(-127, 128, (n, V, R, header.stored_dim)).astype(header.quantiser.dtype),
        scale=random.uniform(0.1, 9, (n, V, R)).astype(np.float16) if header.quantiser.has_scale else None,
        attention=random.uniform(0, 1, (n, V, *shape)).astype(np.float16),
        box=random.integers(0, 2**31, (n, V, 4)).astype(np.int32),
        hflip=random.integers(0, 2, (n, V)).astype(np.uint8),
        source_hash=random.integers(0, 2**64, n, np.uint64),
        keys=keys[:n],
        images=images,
    )
    folder = Path(tempfile.mkdtemp())
    try:
        create_cache(folder / "cache", header)
        open_writer(folder / "cache").write_shard(0, data)
        reader = open_cache(folder / "cache")
        for i in range(n):
            for v in range(V):
                record = reader.read(i, v)
                assert record.key == keys[i]
                assert record.source_hash == data.source_hash[i]
                assert record.hflip == data.hflip[i, v]
                np.testing.assert_array_equal(record.tokens, data.tokens[i, v, bool(summary) :])
                if summary:
                    np.testing.assert_array_equal(record.summary, data.tokens[i, v, :1])
                np.testing.assert_array_equal(record.attention, data.attention[i, v])  # type: ignore[index]
                np.testing.assert_array_equal(record.box, data.box[i, v])
                assert record.image == (images[i][v] if store == "webdataset" else None)  # type: ignore[index]
    finally:
        shutil.rmtree(folder)
