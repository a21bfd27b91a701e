import errno
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.assembly import extraction
from pipeline.assembly.caches import views_of
from pipeline.assembly.extraction import Extractor
from pipeline.assembly.samples import PretrainDataset
from pipeline.assembly.teachers import load_teacher
from pipeline.cache import CacheWriter, ShardData, open_cache, read_header
from pipeline.configs.data import ViewConfig
from pipeline.configs.teachers import TeacherConfig
from pipeline.data import rendering
from pipeline.data import views as view_module
from pipeline.data.decoding import decode
from pipeline.data.images import open_images
from pipeline.data.masks import MaskSampler
from pipeline.data.views import View, render, to_chw, view_of_epoch
from pipeline.errors import CacheError, ConfigError, DataError, StorageError, TeacherError
from pipeline.teachers import Teacher
from pipeline.weights import state_digest
from stages import extract_teacher_features, verify_cache
from stages.extract_teacher_features import ExtractConfig
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
                image = decode(record.image)
            else:
                box = tuple(int(side) for side in record.box)
                image = render(decode(images.read(index)), View(box, record.hflip), 64)  # type: ignore[arg-type]
            out = teacher(to_chw(np.asarray(image)[None].copy()))
            cosine = torch.nn.functional.cosine_similarity(out.tokens[0], torch.from_numpy(record.tokens), dim=-1)
            assert cosine.min() > 0.999
            assert out.attention is not None
            assert np.abs(out.attention[0].numpy() - record.attention).max() < 1e-3
            assert record.key == images.key(index)


def test_a_sound_cache_verifies_at_every_level(cache: Path) -> None:
    for level in ("quick", "full", "deep"):
        found = verify_cache.run(
            verify_cache.VerifyConfig.model_validate({"path": cache, "level": level, "samples": 6})
        )
        assert found.sound, found.to_text()
        assert "checked" in found.images or level == "quick"


def test_caches_that_know_the_digest_of_resampled_weights_go_on(
    image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once positions were hashed as they were resampled to the teacher's input, whose last bits depend on the CPU."""
    path = tmp_path / "cache"
    config = extract_config(image_tree, path, data__limit=8)
    with monkeypatch.context() as once:
        once.setattr(Teacher, "weights_sha256", property(lambda teacher: state_digest(teacher.backbone.state_dict())))
        extract_teacher_features.run(config)
    now = load_teacher(TeacherConfig.model_validate(TEACHER), torch.device("cpu")).weights_sha256
    assert read_header(path).teacher["weights_sha256"] != now
    shutil.rmtree(path / "commits")  # as if it had been stopped before its first shard was whole
    assert extract_teacher_features.run(config)["images"] == 8
    options = {"path": path, "level": "deep", "samples": 4}
    assert verify_cache.run(verify_cache.VerifyConfig.model_validate(options)).sound
    assert "was made by other versions" not in caplog.text


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


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_repair_revives_images_that_can_be_read_by_now(
    image_tree: Path, tmp_path: Path, make_cache: Make, store: str
) -> None:
    """Two images are lost at extraction; one is restored later: its shard becomes what it would have been."""
    shutil.copytree(image_tree, tmp_path / "images")
    lost = [sorted((tmp_path / "images").rglob("*.jpg"))[at] for at in (3, 17)]
    originals = [file.read_bytes() for file in lost]
    for file, original in zip(lost, originals, strict=True):
        file.write_bytes(bytes(len(original)))
    changes = {
        "images": tmp_path / "images",
        "max_tombstones": 0.1,
        "cache__store": store,
        "cache__quantiser": "float16",
    }
    path = make_cache("cache", **changes)
    assert list(open_cache(path).tombstones) == [3, 17]
    before = content(path)
    unchanged = verify_cache.run(verify_cache.VerifyConfig(path=path, repair=True))
    assert unchanged.mended is None
    assert content(path) == before

    lost[0].write_bytes(originals[0])
    assert verify_cache.run(verify_cache.VerifyConfig(path=path)).mended is None
    revived = verify_cache.run(verify_cache.VerifyConfig(path=path, level="quick", repair=True))
    assert revived.sound
    assert revived.mended is not None
    assert revived.mended.shards == [0]
    assert list(open_cache(path).tombstones) == [17]
    assert content(path) == content(make_cache("anew", **changes))


def test_repair_extracts_changed_images_again(image_tree: Path, tmp_path: Path, make_cache: Make) -> None:
    """Of the same length, that is: by its digest the dataset is still the one of the header."""
    shutil.copytree(image_tree, tmp_path / "images")
    changed = sorted((tmp_path / "images").rglob("*.jpg"))[20]
    content_of_it = bytearray(changed.read_bytes())
    path = make_cache("cache", images=tmp_path / "images", cache__quantiser="float16")
    content_of_it[-40] ^= 1
    changed.write_bytes(content_of_it)
    found = verify_cache.run(verify_cache.VerifyConfig(path=path))
    assert [(f.kind, f.shard, f.sample) for f in found.report.findings] == [("changed", 2, 20)]
    mended = verify_cache.run(verify_cache.VerifyConfig(path=path, repair=True))
    assert mended.sound
    anew = make_cache("anew", images=tmp_path / "images", cache__quantiser="float16")
    assert content(path) == content(anew)


@pytest.mark.parametrize("level", ["full", "deep"])
def test_nothing_is_repaired_from_other_images(image_tree: Path, tmp_path: Path, make_cache: Make, level: str) -> None:
    path = make_cache()
    others = tmp_path / "others"
    shutil.copytree(image_tree, others)
    max(others.rglob("*.jpg")).write_bytes(b"of another length")
    before = content(path)
    options = {"path": path, "level": level, "data": str(others), "repair": True}
    found = verify_cache.run(verify_cache.VerifyConfig.model_validate(options))
    assert [finding.kind for finding in found.report.findings] == ["dataset"]
    assert content(path) == before
    (path / "commits/000001.json").unlink()
    with pytest.raises(CacheError, match=r"shards \[1\] are damaged, and keys or sizes .*: say with --data"):
        verify_cache.run(verify_cache.VerifyConfig.model_validate(options))
    assert {name: before[name] for name in content(path)} == content(path)


@pytest.mark.parametrize("how", ["gone", "forbidden"])
def test_an_index_is_rebuilt_without_images_and_teacher(
    image_tree: Path, tmp_path: Path, make_cache: Make, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    images = tmp_path / "images"
    shutil.copytree(image_tree, images)
    path = make_cache(images=images, cache__store="webdataset")
    before = (path / "index/000001-00.index").read_bytes()
    (path / "index/000001-00.index").write_bytes(b"{}")
    if how == "gone":
        shutil.rmtree(images)
    else:

        def forbid(*_: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(images))

        monkeypatch.setattr(verify_cache, "open_images", forbid)
    monkeypatch.setattr(verify_cache, "teacher_of_cache", None)
    mended = verify_cache.run(verify_cache.VerifyConfig(path=path, repair=True))
    assert mended.sound
    assert mended.images.startswith("not found at")
    assert (path / "index/000001-00.index").read_bytes() == before
    (path / "commits/000001.json").unlink()
    with pytest.raises(CacheError, match=r"extracting anew needs the images, which are not at .*: say with --data"):
        verify_cache.run(verify_cache.VerifyConfig(path=path, repair=True))


def test_another_decoder_is_a_warning_and_no_damage(
    make_cache: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The stored JPEGs of another encoder hold the same views in other bytes."""
    path = make_cache(cache__store="webdataset")
    encode = rendering.encode_jpeg
    monkeypatch.setattr(rendering, "encode_jpeg", lambda image, quality: encode(image, quality - 1))
    assert not verify_cache.run(verify_cache.VerifyConfig(path=path, level="deep", samples=4)).sound
    assert "other versions" not in caplog.text
    monkeypatch.setattr(rendering.PIL, "__version__", "0.1")
    assert verify_cache.run(verify_cache.VerifyConfig(path=path, level="deep", samples=4)).sound
    assert re.search(r"made by other versions \(decoder was .* and is .*pillow 0\.1\)", caplog.text)


def test_the_attention_of_each_head_is_sound(image_tree: Path, make_cache: Make) -> None:
    """What a head gives to the class token is not in its row, which then sums to less than 1."""
    path = make_cache(cache__attention="heads")
    sums = np.stack([open_cache(path).read(index, 0).attention.astype(np.float32).sum(-1) for index in range(24)])
    assert sums.max() < 1 < sums.max() + 0.2
    for level in ("full", "deep"):
        assert verify_cache.run(verify_cache.VerifyConfig.model_validate({"path": path, "level": level})).sound


def test_images_of_another_length_revive_nothing(image_tree: Path, tmp_path: Path, make_cache: Make) -> None:
    """They are another dataset, as the digest says: mixing them in would pass for the old one."""
    shutil.copytree(image_tree, tmp_path / "images")
    broken = sorted((tmp_path / "images").rglob("*.jpg"))[3]
    original = broken.read_bytes()
    broken.write_bytes(original[:100])
    path = make_cache("cache", images=tmp_path / "images", max_tombstones=0.1)
    broken.write_bytes(original)
    found = verify_cache.run(verify_cache.VerifyConfig(path=path, repair=True))
    assert not found.sound
    assert found.mended is not None
    assert found.mended.shards == []
    assert list(open_cache(path).tombstones) == [3]


def test_a_disk_that_stops_answering_stops_the_run_and_makes_no_tombstone(
    image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_bytes = Path.read_bytes

    def read(path: Path) -> bytes:
        if path.name == "09.jpg":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    monkeypatch.setattr("pipeline.data.images._PAUSES", ())
    config = extract_config(image_tree, tmp_path / "cache", cache__quantiser="float16")
    with pytest.raises(StorageError, match=r"image class0/09\.jpg: Input/output error"):
        extract_teacher_features.run(config)
    monkeypatch.undo()
    extract_teacher_features.run(config)
    assert not open_cache(tmp_path / "cache").tombstones


def test_a_disk_that_was_unmounted_makes_no_tombstone(image_tree: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(image_tree, images)
    config = extract_config(images, tmp_path / "cache", cache__quantiser="float16", max_tombstones=1.0)
    extract_teacher_features.run(config, shard_range="0:1")
    source = open_images(str(images))
    shutil.rmtree(images)
    images.mkdir()  # as a mount point without its disk
    with pytest.raises(StorageError, match="is gone or empty; mount it"):
        source.read(9)
    (images / "other").touch()
    with pytest.raises(DataError, match="No such file"):
        source.read(9)


def test_a_run_stops_where_too_many_images_are_lost(
    image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the shard is committed: its images may be there again tomorrow."""
    monkeypatch.setattr(Path, "read_bytes", lambda _path: b"no image")
    config = extract_config(image_tree, tmp_path / "cache", cache__quantiser="float16", max_tombstones=0.5)
    with pytest.raises(DataError, match="16 of 24 images can't be read"):
        extract_teacher_features.run(config)
    assert open_cache(tmp_path / "cache").missing_shards() == [1, 2]
    monkeypatch.undo()
    extract_teacher_features.run(config)
    assert list(open_cache(tmp_path / "cache").tombstones) == list(range(8))


def test_a_shard_of_blank_images_is_faithful_enough(image_tree: Path, tmp_path: Path) -> None:
    """Its channels hardly vary, so its errors are held against the deviations of calibration."""
    images = tmp_path / "images"
    shutil.copytree(image_tree, images)
    for name in ("a", "b"):
        Image.new("RGB", (80, 80), (255, 255, 255)).save(images / f"class2/zz{name}.png")
    config = extract_config(images, tmp_path / "cache", cache__samples_per_shard=12, cache__calibration=24)
    facts = extract_teacher_features.run(config)
    assert facts["shards"] == "3 of 3"
    assert facts["nmse_worst"] < 1e-3


def test_repair_takes_the_batches_of_extraction(
    image_tree: Path, tmp_path: Path, make_cache: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_cache(batch_size=6)
    whole = content(path)
    (path / "commits" / "000001.json").unlink()
    sizes, begin = [], Extractor.__post_init__
    monkeypatch.setattr(Extractor, "__post_init__", lambda self: (sizes.append(self.batch_size), begin(self))[1])
    assert verify_cache.run(verify_cache.VerifyConfig(path=path, repair=True)).sound
    assert sizes == [6]
    assert content(path) == whole


def several(images: Path, cache: Path, teachers: dict[str, dict[str, Any]], **changes: Any) -> ExtractConfig:
    """`extract_config` with `teachers` in place of the one teacher."""
    single = extract_config(images, cache, **changes)
    keys = single.model_dump(mode="json", exclude_none=True) | {"teachers": teachers}
    del keys["teacher"]
    return ExtractConfig.model_validate(keys)


THREE: dict[str, dict[str, Any]] = {
    "normed": TEACHER,
    "raw": {**TEACHER, "tokens": "block", "layers": 2},
    "small": {**TEACHER, "spec": "timm:test_vit3", "image_size": 48},
}


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_several_teachers_decode_once_share_forwards_and_write_what_each_writes_alone(
    image_tree: Path, tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    shutil.copytree(image_tree, images)
    broken = images / "class1/07.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    keys: dict[str, Any] = {"cache__store": store, "max_tombstones": 0.1}
    alone = {}
    for name, teacher in THREE.items():
        extract_teacher_features.run(extract_config(images, tmp_path / f"alone-{name}", teacher=teacher, **keys))
        alone[name] = content(tmp_path / f"alone-{name}")

    decoded, forwards = [0], [0]
    decode_once, trace = view_module.decode, Teacher.trace

    def counting_decode(data: bytes) -> Any:
        decoded[0] += 1
        return decode_once(data)

    def counting(self: Teacher, *arguments: Any) -> Any:
        forwards[0] += self.device.type != "meta"  # a rehearsal computes nothing
        return trace(self, *arguments)

    monkeypatch.setattr(view_module, "decode", counting_decode)
    monkeypatch.setattr(Teacher, "trace", counting)
    facts = extract_teacher_features.run(several(images, tmp_path / "together", THREE, **keys))
    assert facts["unreadable_keys"] == ["class1/07.jpg"]
    assert decoded[0] == 24 + 24  # once for all three; and once before, for all three calibrations
    assert forwards[0] == 2 * (24 * 2 // 16 + 24 // 16 + 1)  # two networks for three teachers
    assert facts["normed.shards"] == facts["raw.shards"] == "3 of 3"
    for name, files in alone.items():
        assert content(tmp_path / "together" / name) == files


def test_of_several_caches_only_what_lacks_is_written(image_tree: Path, tmp_path: Path) -> None:
    config = several(image_tree, tmp_path / "caches", THREE)
    extract_teacher_features.run(config)
    before = {name: content(tmp_path / "caches" / name) for name in THREE}
    stamps = (tmp_path / "caches/raw/commits/000001.json").stat().st_mtime_ns
    (tmp_path / "caches/normed/commits/000001.json").unlink()
    shutil.rmtree(tmp_path / "caches/small")
    assert extract_teacher_features.run(config)["images"] == 24
    assert {name: content(tmp_path / "caches" / name) for name in THREE} == before
    assert (tmp_path / "caches/raw/commits/000001.json").stat().st_mtime_ns == stamps


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden"])
def test_names_of_teachers_become_folders(image_tree: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="a name becomes a folder"):
        several(image_tree, tmp_path, {name: TEACHER})


def test_one_way_to_name_teachers(image_tree: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"give teacher\.spec"):
        several(image_tree, tmp_path, {})


def test_non_finite_tokens_stop_the_run_and_name_the_place(
    image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_cache: Make
) -> None:
    config = extract_config(image_tree, tmp_path / "cache")
    extract_teacher_features.run(config, init_only=True)
    look = extraction.run_teachers

    def broken(*arguments: Any) -> Any:
        return [out._replace(tokens=out.tokens.index_fill(1, torch.tensor([3]), np.nan)) for out in look(*arguments)]

    monkeypatch.setattr(extraction, "run_teachers", broken)
    with pytest.raises(TeacherError, match=r"tokens near class0/00\.jpg that are not finite"):
        extract_teacher_features.run(config)
    assert open_cache(tmp_path / "cache").missing_shards() == [0, 1, 2]


def test_a_slow_disk_slows_extraction_and_fills_no_memory(
    image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the disk does, at most two shards are being written while another is being filled."""
    started, written, ahead = [0], [0], []
    write, finish = CacheWriter.write_shard, extraction.ShardInProgress.finish

    def slowly(self: CacheWriter, shard: int, data: ShardData) -> None:
        time.sleep(0.2)
        write(self, shard, data)
        written[0] += 1

    def finishing(self: Any, times: dict[str, float]) -> ShardData:
        started[0] += 1
        ahead.append(started[0] - written[0])
        return finish(self, times)  # type: ignore[no-any-return]

    monkeypatch.setattr(CacheWriter, "write_shard", slowly)
    monkeypatch.setattr(extraction.ShardInProgress, "finish", finishing)
    extract_teacher_features.run(extract_config(image_tree, tmp_path / "cache", cache__samples_per_shard=2))
    assert started == written == [12]
    assert max(ahead) == 3


def test_the_rate_is_of_views(image_tree: Path, tmp_path: Path) -> None:
    began = time.perf_counter()
    facts = extract_teacher_features.run(extract_config(image_tree, tmp_path / "cache"))
    assert facts["views_per_s"] > 24 * 2 / (time.perf_counter() - began)
    assert "images_per_s" not in facts


def test_calibration_takes_samples_of_every_class(
    image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ones of a tree are of one class; and what can't be read is passed over."""
    images = tmp_path / "images"
    shutil.copytree(image_tree, images)
    (images / "class1/13.jpg").write_bytes(b"no image")
    seen: list[list[int]] = []
    render_views = rendering.ViewRenderer.__getitems__

    def watch(self: rendering.ViewRenderer, requests: list[tuple[int, int]]) -> rendering.RenderedViews:
        seen[-1] += [index for _, index in requests]
        return render_views(self, requests)

    monkeypatch.setattr(rendering.ViewRenderer, "__getitems__", watch)
    for name in ("a", "b"):
        seen.append([])
        extract_teacher_features.run(extract_config(images, tmp_path / name, cache__calibration=6), init_only=True)
    assert seen[0] == seen[1] == [0, 4, 8, 12, 16, 20]
    assert open_cache(tmp_path / "a").header == open_cache(tmp_path / "b").header
    for file in images.rglob("*.jpg"):
        file.write_bytes(b"no image")
    seen.append([])
    with pytest.raises(DataError, match="none of 6 images, spread over all, can be decoded"):
        extract_teacher_features.run(extract_config(images, tmp_path / "c", cache__calibration=6), init_only=True)


@pytest.mark.parametrize("interpolation", ["pillow", "torch"])
@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_every_stage_renders_by_the_caches_interpolation(
    image_tree: Path, make_cache: Make, store: str, interpolation: Literal["pillow", "torch"]
) -> None:
    """The teacher's pixels, the student's, and those of deep verification and of repair: to the byte."""
    size = {"count": 2, "image_size": 48}
    teacher = {**TEACHER, "image_size": 48}
    path = make_cache(cache__store=store, teacher=teacher, views={**size, "interpolation": interpolation})
    before, reader, source = content(path), open_cache(path), open_images(str(image_tree))
    policy = ViewConfig.model_validate({**size, "interpolation": interpolation})
    seen = rendering.ViewRenderer(source, policy, store == "webdataset").__getitems__([(0, i) for i in range(24)])
    masks = MaskSampler(9, 2, "random", seed=0)
    dataset = PretrainDataset(source, {"teacher": reader}, views_of({"teacher": reader}), masks, "none")
    for epoch in range(2):
        shown = dataset.__getitems__([(epoch, index) for index in range(24)]).images
        for index in range(24):
            assert torch.equal(shown[index], seen.pixels[index, view_of_epoch(index, epoch, 2)])
    assert ("interpolation" in before["cache.json"].decode().split('"views"')[1]) == (interpolation == "torch")
    deep = verify_cache.VerifyConfig.model_validate({"path": path, "level": "deep", "samples": 24})
    found = verify_cache.run(deep)
    assert found.sound, found.to_text()
    (path / "commits/000001.json").unlink()
    assert verify_cache.run(verify_cache.VerifyConfig(path=path, repair=True)).sound
    assert content(path) == before


def test_another_interpolation_is_another_cache(make_cache: Make, image_tree: Path, tmp_path: Path) -> None:
    make_cache()
    views = {"count": 2, "image_size": 64, "interpolation": "torch"}
    with pytest.raises(CacheError, match=r"interpolation is bicubic there, bicubic, torch .* here; choose another"):
        extract_teacher_features.run(extract_config(image_tree, tmp_path / "cache", views=views))


def test_a_full_disk_ends_the_run_with_the_next_batch(
    image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_cache: Make
) -> None:
    """Not with the end of the shard that is being filled; and what was written is taken up again."""
    config = extract_config(image_tree, tmp_path / "cache", batch_size=2)
    extract_teacher_features.run(config, init_only=True)
    started, failed, start = [0], threading.Event(), Extractor.start

    def full(*_: Any) -> None:
        failed.set()
        raise CacheError("the disk is full")

    def starting(self: Extractor, *arguments: Any) -> Any:
        if started[0] == 10:  # two batches into the second shard
            assert failed.wait(30)
        started[0] += 1
        return start(self, *arguments)

    monkeypatch.setattr(CacheWriter, "write_shard", full)
    monkeypatch.setattr(Extractor, "start", starting)
    with pytest.raises(CacheError, match="the disk is full"):
        extract_teacher_features.run(config)
    assert started[0] < 16
    monkeypatch.undo()
    assert open_cache(tmp_path / "cache").missing_shards() == [0, 1, 2]
    extract_teacher_features.run(config)
    assert content(tmp_path / "cache") == content(make_cache("whole", batch_size=2))


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_tombstones_hold_nothing_of_a_former_shard(
    image_tree: Path, tmp_path: Path, make_cache: Make, store: str
) -> None:
    """Six shards go through three buffers: as if each had been the first one of its run."""
    images = tmp_path / "images"
    shutil.copytree(image_tree, images)
    for number in (7, 9, 16, 23):
        file = sorted(images.rglob("*.jpg"))[number]
        file.write_bytes(bytes(100))
    keys: dict[str, Any] = {"cache__samples_per_shard": 4, "cache__store": store, "max_tombstones": 0.5}
    whole = content(make_cache("whole", images=images, **keys))
    config = extract_config(images, tmp_path / "parts", **keys)
    for shard in range(6):
        extract_teacher_features.run(config, shard_range=f"{shard}:{shard + 1}")
    assert content(tmp_path / "parts") == whole


def test_a_teacher_without_attention_is_named_before_its_cache_is_made(
    image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stop(path: Path, _header: object) -> None:
        raise CacheError(f"{path} is about to be made")

    monkeypatch.setattr("pipeline.cache.output.create_cache", stop)
    blind = {**TEACHER, "spec": "timm:test_vit4"}
    with pytest.raises(CacheError, match="about to be made"):
        extract_teacher_features.run(extract_config(image_tree, tmp_path / "cache", teacher=blind))
    assert "teacher test_vit4: it has no attention to focus by" in caplog.text
    assert "mask.focus=random" in caplog.text
    assert "caches.NAME.path" in caplog.text
