"""What an image's bytes may do: start no program, and be held for broken only where the decoder says so of them."""

import errno
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFile

from pipeline.cache import open_cache
from pipeline.data import decoding
from pipeline.data.decoding import decode, decode_array
from pipeline.errors import DataError, StorageError
from stages import extract_teacher_features
from tests.test_pipeline.data.test_images import encode
from tests.test_stages.conftest import extract_config

ROOT = Path(__file__).parents[3]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n0 0 moveto\nshowpage\n%%EOF\n"
PNG = encode(Image.effect_noise((64, 64), 50), "PNG")


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in `gs` first on PATH; the file that it writes when it is started."""
    started, program = tmp_path / "started", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho $@ >> {started}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # as in a process that has not looked for it yet
    return started


def test_an_eps_that_is_called_jpg_starts_no_program(ghostscript: Path) -> None:
    for data in (EPS, b"\xc5\xd0\xd3\xc6" + bytes(40), b"\xd7\xcd\xc6\x9a" + bytes(40)):
        with pytest.raises(DataError, match=r"not a readable image: (EPS|WMF) is no raster format"):
            decode(data)
    assert not ghostscript.exists()


def test_an_eps_is_a_tombstone_and_not_the_end_of_the_extraction(
    ghostscript: Path, image_tree: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    for file in sorted(image_tree.rglob("*.jpg"))[:8]:
        target = images / file.relative_to(image_tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    (images / "class0" / "00.jpg").write_bytes(EPS)
    extract_teacher_features.run(extract_config(images, tmp_path / "cache", max_tombstones=0.5))
    (reason,) = open_cache(tmp_path / "cache").tombstones.values()
    assert "EPS is no raster format" in reason
    assert not ghostscript.exists()


def test_one_place_opens_images() -> None:
    calls = [
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for folder in ("pipeline", "stages", "benchmarks")
        for file in sorted((ROOT / folder).rglob("*.py"))
        for line in file.read_text().splitlines()
        if re.search(r"\bImage\.open\b|from PIL.Image import|imread", line)
    ]
    assert len(calls) == 1
    assert "pipeline/data/decoding.py" in calls[0]
    assert "formats=_FORMATS" in calls[0]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"), OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.EIO, "Input/output error"),
    ],
    ids=["MemoryError", "ENOMEM", "EMFILE", "EIO"],
)  # fmt: skip
def test_what_the_machine_lacks_makes_no_tombstone(
    error: Exception, image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[Any] = []

    def fail(data: bytes) -> None:
        failed.append(data)
        raise error

    config = extract_config(image_tree, tmp_path / "cache", cache__quantiser="float16")
    monkeypatch.setattr(decoding, "_plain_jpeg", fail)
    with pytest.raises(StorageError, match="then run again"):
        extract_teacher_features.run(config)
    assert failed
    assert not list((tmp_path / "cache" / "commits").iterdir())
    monkeypatch.undo()
    extract_teacher_features.run(config)
    assert not open_cache(tmp_path / "cache").tombstones


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_a_lack_of_memory_inside_pillow_says_nothing_of_the_bytes(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_image: ImageFile.ImageFile) -> None:
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(StorageError):
        decode(PNG)


def test_libjpegs_lack_of_memory_is_not_a_broken_stream() -> None:
    """Under a limit that leaves a decoder too little: libjpeg's error is Pillow's "broken data stream"."""
    code = """
import io, resource, sys
from PIL import Image
from pipeline.data import decoding
from pipeline.errors import DataError, StorageError
buffer = io.BytesIO()
Image.new("L", (9000, 9000)).save(buffer, "JPEG", progressive=True)
decoding.decode(buffer.getvalue())
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
wrong = 0
for spare in range(10, 260, 25):
    resource.setrlimit(resource.RLIMIT_AS, (used + (spare << 20), resource.RLIM_INFINITY))
    try:
        decoding.decode(buffer.getvalue())
    except StorageError:
        wrong += 1
    except DataError as error:
        sys.exit(f"{spare} MiB: {error}")
print(wrong)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_a_row_too_long_for_a_decoder_is_the_images_fault() -> None:
    wide = bytearray(encode(Image.new("RGB", (8, 1)), "PNG"))
    wide[16:20] = (40_000_000).to_bytes(4, "big")
    wide[29:33] = zlib.crc32(wide[12:29]).to_bytes(4, "big")
    with pytest.raises(DataError, match="40000000x1 pixels"):
        decode_array(bytes(wide))
