"""Files are written whole, whatever pieces they come in, and read whole, whatever the kernel gives at once."""

import os
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.cache import files
from pipeline.cache.files import Descriptor, aligned, hash_file, write_file

QUICKLY = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIZES = st.lists(st.sampled_from([0, 1, 511, 4096, files.BLOCK // 2, files.BLOCK - 1, files.BLOCK + 3]), max_size=6)


@QUICKLY
@given(sizes=SIZES)
def test_a_file_is_its_parts_in_order(tmp_path: Path, sizes: list[int]) -> None:
    parts = [np.random.default_rng(at).integers(0, 256, size, np.uint8) for at, size in enumerate(sizes)]
    entry = write_file(tmp_path / "file", iter(parts))
    content = b"".join(part.tobytes() for part in parts)
    assert (tmp_path / "file").read_bytes() == content
    assert (entry.bytes, entry.xxh3_128) == (len(content), xxhash.xxh3_128_hexdigest(content))
    assert hash_file(tmp_path / "file") == entry


def test_parts_of_any_type_are_bytes(tmp_path: Path) -> None:
    halves = np.arange(6, dtype=np.float16).reshape(2, 3)
    write_file(tmp_path / "file", [b"ab", halves, bytearray(b"c"), np.empty((0, 3), np.int32)])
    assert (tmp_path / "file").read_bytes() == b"ab" + halves.tobytes() + b"c"


def test_parts_are_read_one_behind_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(200))
    (tmp_path / "file").write_bytes(content)
    for most in (1000, 30):  # bytes that the kernel gives at once
        monkeypatch.setattr(
            files, "preadv", lambda file, parts, at, most=most: os.preadv(file, [memoryview(parts[0])[:most]], at)
        )
        parts = [np.zeros(40, np.uint8), np.zeros(60, np.uint8)]
        Descriptor(tmp_path / "file").read_parts(parts, 100, 10)
        assert b"".join(part.tobytes() for part in parts) == content[10:110]


@pytest.mark.parametrize("size", [1, 4096, 5000])
def test_memory_starts_at_a_page(size: int) -> None:
    room = aligned(size)
    assert (room.ctypes.data % 4096, len(room)) == (0, size)
