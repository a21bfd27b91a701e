import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.assembly import load_teacher
from pipeline.cache import open_cache
from pipeline.data.images import decode, open_images
from pipeline.data.views import View, render, to_chw
from pipeline.errors import CacheError, ConfigError, DataError
from pipeline.teachers.config import TeacherConfig
from stages import extract_teacher_features, verify_cache
from tests.test_stages.conftest import TEACHER, extract_config

Make = Callable[..., Path]


def content(path: Path) -> dict[str, bytes]:
    """Every file of a cache; commit records without their times, and the digest that covers these."""
    files = {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    for name, data in files.items():
        if name.startswith("commits/"):
            record = json.loads(data)
            files[name] = json.dumps({key: record[key] for key in record if key not in ("times", "digest")}).encode()
    return files


def test_targets_are_the_teachers_tokens_of_the_very_pixels_that_training_will_see(
    cache: Path, image_tree: Path
) -> None:
    reader, images = open_cache(cache), open_images(str(image_tree))
    teacher = load_teacher(TeacherConfig.model_validate(TEACHER), torch.device("cpu"))
    for index in range(0, 24, 5):
        for view in range(2):
            record = reader.read(index, view, dequantise=True)
            if record.image is not None:
                pixels = to_chw(decode(record.image))
            else:
                box = tuple(int(side) for side in record.box)
                pixels = to_chw(render(decode(images.read(index)), View(box, record.hflip), 64))  # type: ignore[arg-type]
            out = teacher(torch.from_numpy(pixels)[None])
            cosine = torch.nn.functional.cosine_similarity(out.tokens[0], torch.from_numpy(record.tokens), dim=-1)
            assert cosine.min() > 0.999
            assert out.attention is not None
            assert np.abs(out.attention[0].numpy() - record.attention).max() < 1e-3
            assert reader.key(index) == images.key(index)


def test_a_sound_cache_verifies_at_every_level(cache: Path) -> None:
    for level in ("quick", "full", "deep"):
        found = verify_cache.run(
            verify_cache.VerifyConfig.model_validate({"path": cache, "level": level, "samples": 6})
        )
        assert found.sound, found.to_text()
        assert "checked" in found.images or level == "quick"


def test_running_again_does_nothing(make_cache: Make, image_tree: Path, tmp_path: Path) -> None:
    before = content(make_cache())
    facts = extract_teacher_features.run(extract_config(image_tree, tmp_path / "cache"))
    assert facts["images"] == 0
    assert content(tmp_path / "cache") == before


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_shard_ranges_give_the_same_bytes_as_one_run(
    make_cache: Make, image_tree: Path, tmp_path: Path, store: str
) -> None:
    whole = content(make_cache("whole", cache__store=store))
    config = extract_config(image_tree, tmp_path / "parts", cache__store=store)
    assert extract_teacher_features.run(config, init_only=True)["extracted"] == 0
    for part in ("2:3", "0:1"):
        extract_teacher_features.run(config, shard_range=part)
    assert open_cache(tmp_path / "parts").missing_shards() == [1]
    extract_teacher_features.run(config)
    assert content(tmp_path / "parts") == whole


def test_unreadable_images_become_tombstones(image_tree: Path, tmp_path: Path, make_cache: Make) -> None:
    shutil.copytree(image_tree, tmp_path / "images")
    broken = sorted((tmp_path / "images").rglob("*.jpg"))[3]
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(DataError, match=r"1 of 24 images can't be read \(the first: class0/09.jpg"):
        make_cache("strict", images=tmp_path / "images")
    reader = open_cache(make_cache("lenient", images=tmp_path / "images", max_tombstones=0.1))
    assert list(reader.tombstones) == [3]
    assert 3 not in reader.live_indices()
    assert len(reader.live_indices()) == 23
    with pytest.raises(CacheError, match="tombstone"):
        reader.read(3, 0)


def test_another_cache_in_the_folder_is_refused(make_cache: Make, image_tree: Path, tmp_path: Path) -> None:
    make_cache()
    with pytest.raises(CacheError, match=r"views\.count is 2 there, 1 here"):
        extract_teacher_features.run(extract_config(image_tree, tmp_path / "cache", views__count=1))


@pytest.mark.parametrize("text", ["3:3", "0:9", "x", "-1:2"])
def test_shard_range_must_make_sense(image_tree: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="give A:B"):
        extract_teacher_features.run(extract_config(image_tree, tmp_path / "cache"), shard_range=text)


def test_repair_restores_a_damaged_shard(make_cache: Make, tmp_path: Path) -> None:
    path = make_cache()
    before = content(path)
    chunk = max(path.glob("tokens/c.1.*"), key=lambda file: file.stat().st_size)
    damaged = bytearray(chunk.read_bytes())
    damaged[1000] ^= 1
    chunk.write_bytes(damaged)
    found = verify_cache.run(verify_cache.VerifyConfig(path=path))
    assert not found.sound
    assert any(finding.shard == 1 for finding in found.report.findings)
    mended = verify_cache.run(verify_cache.VerifyConfig(path=path, repair=True))
    assert mended.sound
    assert mended.mended is not None
    assert mended.mended.shards == [1]
    assert content(path) == before
