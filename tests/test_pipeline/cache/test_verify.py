"""Every fault is found, by verification and where training touches it by the reader; a sound cache never fails."""

import errno
import importlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import zarr

from pipeline.cache import (
    CacheHeader,
    Reextracted,
    Report,
    compare,
    create_cache,
    open_cache,
    open_writer,
    read_header,
    remove_left_overs,
    repair,
    verify,
)
from pipeline.cache import files as cache_files
from pipeline.cache.files import checksum, hash_file
from pipeline.cache.format.commits import Commit, write_commit
from pipeline.errors import CacheDamage, CacheError, DataError, PipelineError, StorageError
from pipeline.files import hash_source
from tests.test_pipeline.cache.samples import (
    CLUSTERS,
    LAYOUTS,
    STORES,
    SUMMARIES,
    attention_of,
    float_summary,
    float_tokens,
    key_of,
    make_cache,
    make_header,
    make_shard,
    source_bytes,
)

TOMBSTONES = {5: "cannot identify image file"}


class Photos:
    """The images that `samples` pretends the cache was made of."""

    def __init__(self, changed: int | None = None, digest: str = "d" * 32, count: int = 10) -> None:
        self._changed, self._digest, self._count = changed, digest, count

    def __len__(self) -> int:
        return self._count

    def key(self, index: int) -> str:
        return key_of(index)

    def read(self, index: int) -> bytes:
        if index == 5:
            raise DataError("sample 5 can't be read")
        return b"another" if index == self._changed else source_bytes(index)

    def digest(self) -> str:
        return self._digest


def teacher(header: CacheHeader, **changes: object) -> Callable[[Sequence[int], Sequence[int]], Iterable[Reextracted]]:
    """A live teacher that says what the cache holds, but for what `changes` name."""

    def reextract(indices: Sequence[int], views: Sequence[int]) -> Iterable[Reextracted]:
        for i, v in zip(indices, views, strict=True):
            fresh = {
                "tokens": float_tokens(header, i, v).numpy(),
                "attention": attention_of(header, i, v),
                "box": (i, v, i + 1, v + 1),
                "hflip": bool((i + v) % 2),
                "source_hash": hash_source(source_bytes(i)),
                "summary": float_summary(header, i, v).numpy(),
            }
            yield Reextracted(**(fresh | {k: f(fresh[k]) if callable(f) else f for k, f in changes.items()}))

    return reextract


def reads_all(path: Path) -> None:
    reader = open_cache(path)
    for index in reader.live_indices().tolist():
        reader.read(index, 0)
        reader.read(index, 1)


def mend(path: Path, report: Report) -> None:
    """Repair, and check that nothing but the damaged shards was extracted."""
    header, asked = read_header(path), []

    def extract(shard: int) -> object:
        asked.append(shard)
        return make_shard(header, shard, TOMBSTONES)

    repair(path, report, extract)  # type: ignore[arg-type]
    assert asked == report.damaged_shards()
    assert verify(path, "full").sound
    reads_all(path)


@pytest.mark.parametrize("level", ["quick", "full"])
def test_a_sound_cache_passes(cache: Path, level: str) -> None:
    report = verify(cache, level, source=Photos())  # type: ignore[arg-type]
    assert report.sound, report.findings
    assert not report.notes
    assert report.counts["committed"] == 3
    assert report.counts["tombstones"] == 1
    assert report.counts["records"] == (18 if level == "full" else 0)
    json.dumps(report.to_json())


@pytest.mark.parametrize(("attention", "quantiser", "summary"), LAYOUTS)
def test_every_layout_passes(tmp_path: Path, store: str, attention: str, quantiser: str, summary: str | None) -> None:
    header = make_header(store, quantiser_name=quantiser, attention=attention, heads=2, summary=summary)
    report = verify(make_cache(tmp_path / "cache", header), "full")
    assert report.sound, report.findings


@pytest.mark.parametrize(("quantiser", "summary"), [("int8", None), ("int8", "class"), ("int4", None), ("codes", None)])
@pytest.mark.parametrize("store", STORES)
def test_one_flipped_bit_in_any_file_is_found(tmp_path: Path, store: str, quantiser: str, summary: str | None) -> None:
    """Three bits of every file, among them the first and the last."""
    path = make_cache(tmp_path / "cache", make_header(store, quantiser_name=quantiser, summary=summary), TOMBSTONES)
    random = np.random.default_rng(0)
    for file in [f for f in path.rglob("*") if f.is_file()]:
        content = file.read_bytes()
        for bit in (0, 8 * len(content) - 1, int(random.integers(8 * len(content)))):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            assert not verify(path, "full").sound, f"bit {bit} of {file.relative_to(path)}"
        file.write_bytes(content)
    assert verify(path, "full").sound


@pytest.mark.parametrize("summary", SUMMARIES)
@pytest.mark.parametrize("store", STORES)
def test_no_flipped_bit_reaches_training(tmp_path: Path, store: str, summary: str | None) -> None:
    """A reader gives what was written or names shard and sample, whichever bit of whichever file is flipped."""
    path = make_cache(tmp_path / "cache", make_header(store, summary=summary), TOMBSTONES)
    written, caught, random = everything(path), set(), np.random.default_rng(1)
    places: list[tuple[Path, str]] = []
    for file in [f for f in path.rglob("*") if f.is_file()]:
        content = file.read_bytes()
        for bit in random.integers(8 * len(content), size=6).tolist():
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            try:
                assert everything(path) == written
            except CacheDamage as error:
                caught.add(file.relative_to(path).parts[0])
                places.append((file, str(error)))
        file.write_bytes(content)
    for file, message in places:
        place = {"commits": r"shard \d: commit record", path.name: r"cache\.json"}.get(file.parent.name)
        assert re.search(place or r"shard \d, sample \d, view \d", message), message
    data = {"shards", "index"} if store == "webdataset" else {"tokens", "attention", "box", "hflip", "crc32c", "key"}
    assert data | {"cache.json", "commits"} <= caught


def everything(path: Path) -> list[object]:
    reader = open_cache(path)
    records = [reader.read(index, view) for index in reader.live_indices().tolist() for view in (0, 1)]
    kept = [(r.tokens, r.scale, r.attention, r.summary, r.summary_scale) for r in records]
    arrays = [[None if array is None else array.tobytes() for array in of_record] for of_record in kept]
    return [arrays, [(r.key, r.box.tolist(), r.hflip, r.source_hash, r.image) for r in records]]


def test_a_disk_that_fails_is_no_damage(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of what it holds. A reader goes on for other samples."""
    file = target_of(cache, "tokens", 1, 1)
    bad = os.stat(file).st_ino

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if os.fstat(descriptor).st_ino == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, buffers, offset)

    monkeypatch.setattr(cache_files, "preadv", preadv)
    line = rf"^{file} can't be read at byte \d+: Input/output error: mend the disk .* remove it and run"
    for attempt in (lambda: verify(cache, "full"), lambda: open_cache(cache).read(4, 1)):
        with pytest.raises(StorageError, match=line) as caught:
            attempt()
        assert caught.value.exit_code == 2
    open_cache(cache).read(4, 0)
    monkeypatch.undo()
    file.unlink()  # as the line says
    mend(cache, verify(cache, "full"))


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_file_that_can_not_be_looked_at_is_no_damage(
    cache: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, look = target_of(cache, "tokens", 1, 1), os.stat

    def stat(path: object, **keys: bool) -> os.stat_result:
        if str(path) == str(file):
            raise OSError(number, os.strerror(number), str(path))
        return look(path, **keys)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(StorageError, match=rf"^{file} can't be looked at: {os.strerror(number)}"):
        verify(cache, "quick")


@pytest.mark.parametrize("file", ["cache.json", "commits/000000.json", "zarr.json", "tokens/zarr.json"])
def test_every_bit_of_the_metadata_counts(tmp_path: Path, file: str) -> None:
    path = make_cache(tmp_path / "cache", make_header("zarr", dim=2, grid=[1, 2]))
    content = (path / file).read_bytes()
    report_of = {"cache.json": lambda: read_header(path), "commits/000000.json": lambda: open_cache(path)}
    for bit in range(0, 8 * len(content), 1 if len(content) < 400 else 7):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (path / file).write_bytes(damaged)
        if file in report_of:
            with pytest.raises(CacheDamage):
                report_of[file]()
        else:
            assert [f.file for f in verify(path, "quick").findings] == [file]


@pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")  # of commits/, and that consolidation may change
def test_what_zarrs_own_tools_add_is_no_damage(tmp_path: Path) -> None:
    """Attributes and consolidated metadata; a shape is no attribute."""
    path = make_cache(tmp_path / "cache", make_header("zarr"), TOMBSTONES)
    group = zarr.open_group(path, mode="r+")
    group.attrs["licence"] = "CC0"
    group["tokens"].attrs["units"] = "none"
    zarr.consolidate_metadata(str(path))
    assert verify(path, "full", source=Photos()).sound
    content = json.loads((path / "tokens/zarr.json").read_text())
    (path / "tokens/zarr.json").write_text(json.dumps(content | {"shape": [1, *content["shape"][1:]]}))
    assert [f.file for f in verify(path, "quick").findings] == ["tokens/zarr.json"]


def target_of(path: Path, name: str, shard: int, view: int) -> Path:
    """A data file of either store: `name` matters in the zarr store."""
    if read_header(path).store == "webdataset":
        return path / "shards" / f"{shard:06d}-{view:02d}.tar"
    return next((path / name).glob(f"c.{shard}.{view}*"))


@pytest.mark.parametrize("cut", ["record", "member", "all"])
def test_truncation(cache: Path, store: str, cut: str) -> None:
    file = target_of(cache, "tokens", 1, 0)
    content = file.read_bytes()
    unit = 48 if store == "zarr" else 512
    # a whole record of the tokens file; in a tar, right behind the first member's data
    length = {"record": unit + unit // 2, "member": 2 * unit, "all": 0}[cut]
    file.write_bytes(content[:length])
    for level in ("quick", "full"):
        report = verify(cache, level)  # type: ignore[arg-type]
        assert {f.shard for f in report.findings} == {1}
        assert file.relative_to(cache).as_posix() in {f.file for f in report.findings}
    assert 6 in {f.sample for f in verify(cache, "full").findings} or cut == "all" or store != "zarr"
    with pytest.raises(CacheDamage, match=r"shard 1, sample \d, view 0"):
        reads_all(cache)
    mend(cache, verify(cache, "full"))


def test_truncation_at_a_tar_member_boundary_between_samples(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache", make_header("webdataset"))
    tar = path / "shards" / "000000-01.tar"
    index = np.frombuffer((path / "index" / "000000-01.index").read_bytes()[:-4], "<i8").reshape(-1, 4)
    tar.write_bytes(tar.read_bytes()[: int(index[2, 0])])
    found = verify(path, "full").findings
    assert {(f.shard, f.sample, f.view) for f in found if f.kind == "record"} == {(0, 2, 1), (0, 3, 1)}
    with pytest.raises(CacheDamage, match="shard 0, sample 2, view 1"):
        reads_all(path)
    mend(path, verify(path, "quick"))


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", ["tokens", "scale", "attention", "box", "hflip", "crc32c"])
def test_a_deleted_file(cache: Path, name: str) -> None:
    target_of(cache, name, 2, 1).unlink()
    for level in ("quick", "full"):
        assert {f.shard for f in verify(cache, level).findings} == {2}  # type: ignore[arg-type]
    with pytest.raises(CacheDamage, match="shard 2, sample 8, view 1"):
        reads_all(cache)
    mend(cache, verify(cache, "quick"))


def swap(a: Path, b: Path) -> None:
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)


def test_two_shards_swapped(tmp_path: Path, store: str) -> None:
    path = make_cache(tmp_path / "cache", make_header(store))
    header = read_header(path)
    names = [p.parent.name for p in path.glob("*/c.0.0*")] or ["tokens"]
    for name in names:
        for view in range(header.views):
            swap(target_of(path, name, 0, view), target_of(path, name, 1, view))
    if store == "zarr":
        for name in ("key", "source_hash"):
            swap(path / name / "c.0", path / name / "c.1")
    else:
        swap(path / "index/000000-00.index", path / "index/000001-00.index")
        swap(path / "index/000000-01.index", path / "index/000001-01.index")
    with pytest.raises(CacheDamage, match="shard 0, sample 0"):
        reads_all(path)
    assert {f.shard for f in verify(path, "full").findings} == {0, 1}
    swap(path / "commits/000000.json", path / "commits/000001.json")
    for level in ("quick", "full"):
        assert {f.shard for f in verify(path, level).findings} == {0, 1}  # type: ignore[arg-type]
    with pytest.raises(CacheDamage, match="shard 0: commit record"):
        open_cache(path)


def test_swapped_shards_with_commits_that_agree_still_fail(tmp_path: Path, store: str) -> None:
    """Someone who renames files and makes commit records to match is still found out: records know their index."""
    path = make_cache(tmp_path / "cache", make_header(store, dataset=dataset_of(8)))
    for file in [f for f in path.rglob("*") if f.is_file()]:
        for old, new in (("c.0", "c.1"), ("000000-", "000001-")):
            if file.name.startswith(old) and file.parent.name != "index":
                swap(file, file.with_name(file.name.replace(old, new, 1)))
    header = read_header(path)
    for shard in (0, 1):
        commit = Commit.from_bytes((path / f"commits/{shard:06d}.json").read_bytes())
        files = {name: hash_file(path / name) for name in commit.files}
        write_commit(path, commit.model_copy(update={"files": files}))
    assert header.shards == 2
    found = verify(path, "full").findings
    assert {f.sample for f in found if f.kind == "record"} == set(range(8))
    with pytest.raises(CacheDamage, match="shard 0, sample 0, view 0"):
        reads_all(path)


def dataset_of(count: int) -> dict[str, object]:
    return {"source": "photos", "kind": "folder", "count": count, "digest": "d" * 32}


@pytest.mark.parametrize("with_commit", [False, True])
def test_a_shard_of_another_cache(cache: Path, store: str, tmp_path: Path, with_commit: bool) -> None:
    other = make_header(store, preprocessing={"resize": "nearest"})
    foreign = make_cache(tmp_path / "other", other, TOMBSTONES)
    for file in [f for f in foreign.rglob("*") if f.name.startswith(("c.1", "000001"))]:
        if with_commit or file.parent.name != "commits":
            shutil.copy(file, cache / file.relative_to(foreign))
    report = verify(cache, "full")
    assert {f.shard for f in report.findings} == {1}
    with pytest.raises(CacheDamage, match="shard 1"):
        reads_all(cache)
    mend(cache, report)


def test_an_edited_header(cache: Path) -> None:
    file = cache / "cache.json"
    file.write_text(file.read_text().replace('"seed": 3', '"seed": 4'))
    report = verify(cache, "quick")
    assert [f.kind for f in report.findings] == ["header"]
    assert report.damaged_shards() == []
    for attempt in (open_cache, open_writer):
        with pytest.raises(CacheDamage, match="was edited"):
            attempt(cache)


def test_a_lost_commit_record(cache: Path) -> None:
    (cache / "commits/000001.json").unlink()
    report = verify(cache, "quick")
    assert [(f.kind, f.shard) for f in report.findings] == [("missing", 1)]
    mend(cache, report)


def test_a_changed_image(cache: Path) -> None:
    assert verify(cache, "quick", source=Photos(changed=7)).sound
    report = verify(cache, "full", source=Photos(changed=7))
    assert [(f.kind, f.shard, f.sample) for f in report.findings] == [("changed", 1, 7)]
    assert report.damaged_shards() == [1]  # the dataset is the same by its digest: extracted again, they agree


def test_an_image_that_is_gone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(self: Photos, index: int) -> bytes:
        raise FileNotFoundError(f"photo {index}")

    monkeypatch.setattr(Photos, "read", gone)
    assert {f.sample for f in verify(cache, "full", source=Photos()).findings} == {0, 1, 2, 3, 4, 6, 7, 8, 9}


@pytest.mark.parametrize("photos", [Photos(digest="e" * 32), Photos(count=11)])
def test_another_dataset(cache: Path, photos: Photos) -> None:
    for level in ("quick", "full"):
        assert [f.kind for f in verify(cache, level, source=photos).findings] == ["dataset"]  # type: ignore[arg-type]


def test_a_teacher_is_not_asked_about_another_dataset(cache: Path) -> None:
    """It would say other things of other images, and the cache is not to blame."""
    wrong = partial(compare, cache, teacher(read_header(cache), tokens=np.zeros_like), 64)
    assert "deep" in {f.kind for f in verify(cache, "deep", Photos(), wrong).findings}
    foreign = verify(cache, "deep", Photos(digest="e" * 32), wrong)
    assert [f.kind for f in foreign.findings] == ["dataset"]
    assert foreign.damaged_shards() == []


@pytest.mark.parametrize("threads", [1, 2])
def test_a_disk_that_does_not_answer_is_no_damage(cache: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    def dead(self: Photos, index: int) -> bytes:
        raise StorageError(f"image {index}: Input/output error")

    monkeypatch.setattr(Photos, "read", dead)
    with pytest.raises(StorageError, match="image 0"):
        verify(cache, "full", source=Photos(), threads=threads)


def test_many_changed_images_are_summed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_cache(tmp_path / "cache", make_header("zarr"), TOMBSTONES)
    # By its name: in the package `verify` is the function.
    monkeypatch.setattr(importlib.import_module("pipeline.cache.check.verify"), "_NAMED", 2)
    monkeypatch.setattr(Photos, "read", lambda self, index: b"another")
    findings = [f for f in verify(path, "full", source=Photos()).findings if f.shard == 0]
    assert [f.kind for f in findings] == ["changed"] * 3
    assert findings[-1].message == "shard 0: 2 more images like these"


def test_repair_gives_no_image_up(cache: Path) -> None:
    """One record is damaged, and its neighbours' images can't be read any more: their records stay."""
    file = target_of(cache, "attention", 0, 0)
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    before = {f: f.read_bytes() for f in cache.rglob("*") if f.is_file()}
    header = read_header(cache)
    lost = {**TOMBSTONES, 1: "permission denied", 2: "permission denied"}
    with pytest.raises(CacheError, match=r"shard 0 stays as it is: 2 of its images .*sample 1: permission denied"):
        repair(cache, verify(cache, "full"), lambda shard: make_shard(header, shard, lost))
    assert {f: f.read_bytes() for f in cache.rglob("*") if f.is_file()} == before


def test_keys_in_another_order(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Photos, "key", lambda self, index: key_of(9 - index))
    assert {f.kind for f in verify(cache, "full", source=Photos()).findings} == {"source"}


def test_the_same_teacher_agrees(cache: Path, store: str) -> None:
    report = verify(cache, "deep", deep=partial(compare, cache, teacher(make_header(store)), 6))
    assert report.sound, report.findings
    assert report.counts["deep"] == 6
    assert report.figures["cosine_mean"] > 0.999


def test_what_the_quantiser_loses_is_no_fault_of_the_teacher(tmp_path: Path, store: str) -> None:
    """int4 alone goes beyond the bounds of int8. Its own are as narrow around what it must lose."""
    header = make_header(store, quantiser_name="int4", dim=96, grid=[7, 7])
    path = make_cache(tmp_path / "cache", header)
    report = verify(path, "deep", deep=partial(compare, path, teacher(header), 9))
    assert report.sound, report.findings
    assert report.figures["cosine_mean"] < 0.998
    noise = np.random.default_rng(0).normal(size=(49, 96))
    for change in (lambda t: t[::-1], lambda t: t + 0.12 * noise.astype(np.float32), lambda t: 1.15 * t):
        found = verify(path, "deep", deep=partial(compare, path, teacher(header, tokens=change), 9)).findings
        assert len(found) == 9
        assert all("other tokens" in finding.message for finding in found)


@pytest.mark.parametrize("quantiser", ["int4", "codes"])
def test_records_are_repaired_to_the_byte(tmp_path: Path, store: str, quantiser: str) -> None:
    path = make_cache(tmp_path / "cache", make_header(store, quantiser_name=quantiser), TOMBSTONES)
    file = target_of(path, "tokens", 1, 0)
    sound = file.read_bytes()
    file.write_bytes(sound[:40] + bytes([sound[40] ^ 16]) + sound[41:])
    mend(path, verify(path, "full"))
    assert file.read_bytes() == sound


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": lambda t: t[::-1]}, "other tokens"),  # other weights
        ({"tokens": lambda t: t + 0.15 * np.cos(np.arange(t.size).reshape(t.shape))}, "other tokens"),  # preprocessing
        ({"tokens": lambda t: t * 1.3}, "other tokens"),  # without the final norm
        ({"tokens": lambda t: t * np.nan}, "other tokens"),
        ({"attention": lambda a: a[::-1]}, "attends elsewhere"),
        ({"box": (0, 0, 5, 5)}, "draws box"),
        ({"hflip": lambda flip: not flip}, "flip"),
        ({"source_hash": 1}, "has changed"),
        ({"image": b"\xff\xd8 another"}, "not the view"),
    ],
)
def test_another_teacher_or_preprocessing_is_found(
    cache: Path, store: str, changes: dict[str, object], message: str
) -> None:
    report = verify(cache, "deep", deep=partial(compare, cache, teacher(make_header(store), **changes), 9))
    assert {f.sample for f in report.findings} == {0, 1, 2, 3, 4, 6, 7, 8, 9}
    assert all(f.kind == "deep" and message in f.message for f in report.findings)


@pytest.mark.parametrize("quantiser", ["int8", "float32"])
def test_another_class_token_is_found_though_the_tokens_agree(tmp_path: Path, store: str, quantiser: str) -> None:
    header = make_header(store, quantiser_name=quantiser, summary="class")
    path = make_cache(tmp_path / "cache", header, TOMBSTONES)
    assert verify(path, "deep", deep=partial(compare, path, teacher(header), 9)).sound
    for change in (lambda s: s[:, ::-1], lambda s: 1.3 * s, lambda s: s * np.nan):
        report = verify(path, "deep", deep=partial(compare, path, teacher(header, summary=change), 9))
        assert {f.sample for f in report.findings} == {0, 1, 2, 3, 4, 6, 7, 8, 9}
        assert all(f.kind == "deep" and "another class token" in f.message for f in report.findings)


def test_deep_needs_a_teacher(cache: Path) -> None:
    with pytest.raises(PipelineError, match="needs the images and the teacher"):
        verify(cache, "deep")


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    ("field", "place", "value", "message"),
    [
        ("scale", (2, 1, 0), 0, "scales"),  # of the summary
        ("scale", (2, 1, 3), 0, "scales"),
        ("scale", (2, 1, 0), np.inf, "scales"),
        ("scale", (2, 1, 3), np.inf, "scales"),
        ("attention", (2, 1), 0.5, "sum to 1"),
        ("attention", (2, 1), np.nan, "sum to 1"),
        ("box", (2, 1), -1, "box"),
        ("hflip", (2, 1), 7, "hflip"),
    ],
)
def test_values_that_cannot_be(
    tmp_path: Path, store: str, field: str, place: tuple[int, ...], value: float, message: str
) -> None:
    header = make_header(store, summary="class")
    path = make_cache(tmp_path / "cache", header)
    data = make_shard(header, 1)
    getattr(data, field)[place] = value
    open_writer(path).write_shard(1, data)
    found = verify(path, "full").findings
    assert [(f.kind, f.shard, f.sample, f.view) for f in found] == [("values", 1, 6, 1)]
    assert message in found[0].message


@pytest.mark.parametrize(("rows", "sound"), [((0.7, 0.0), True), ((1.5, 0.5), False), ((0.0, 0.0), False)])
def test_heads_give_what_they_want_but_not_all_nothing(
    tmp_path: Path, store: str, rows: tuple[float, float], sound: bool
) -> None:
    header = make_header(store, attention="heads", heads=2)
    path = make_cache(tmp_path / "cache", header)
    data = make_shard(header, 1)
    data.attention[2, 1] = np.array(rows)[:, None] / data.attention.shape[-1]
    open_writer(path).write_shard(1, data)
    found = verify(path, "full").findings
    assert [(f.kind, f.sample, f.view) for f in found] == ([] if sound else [("values", 6, 1)])


def test_attention_may_lie_in_one_place_and_zeros_have_signs(tmp_path: Path, store: str) -> None:
    header = make_header(store)
    path = make_cache(tmp_path / "cache", header)
    data = make_shard(header, 1)
    data.attention[2, 1] = [1, 0, 0, -0.0, 6e-8, 0]
    open_writer(path).write_shard(1, data)
    assert verify(path, "full").sound


@pytest.mark.parametrize(
    ("quantiser", "value", "problem"),
    [
        ("float16", np.nan, "tokens are not finite"),
        ("float32", np.nan, "tokens are not finite"),
        ("codes", CLUSTERS, "tokens are of no cluster of the codebook"),
    ],
)
def test_tokens_that_cannot_be(tmp_path: Path, store: str, quantiser: str, value: float, problem: str) -> None:
    header = make_header(store, quantiser_name=quantiser)
    path = make_cache(tmp_path / "cache", header)
    data = make_shard(header, 0)
    data.tokens[3, 0, 1, -1] = value
    open_writer(path).write_shard(0, data)
    (found,) = verify(path, "full").findings
    assert (found.kind, found.sample, found.view) == ("values", 3, 0)
    assert found.message.endswith(problem)


def test_many_damaged_samples_are_summed_up(tmp_path: Path, store: str) -> None:
    header = make_header(store, dataset=dataset_of(40), samples_per_shard=40)
    path = make_cache(tmp_path / "cache", header)
    file = target_of(path, "tokens", 0, 0)
    content = file.read_bytes()
    file.write_bytes(bytes(b ^ 1 for b in content) if store == "zarr" else content.replace(b'"crc32c":', b'"crc32d":'))
    found = [f for f in verify(path, "full").findings if f.kind == "record"]
    assert len(found) == 11
    assert "30 more damaged samples" in found[-1].message


def test_leftovers_are_noted_and_no_damage(cache: Path) -> None:
    (cache / "commits" / ".000000.json.ab12.partial").write_text("{")
    (cache / "notes.txt").write_text("mine")
    report = verify(cache, "full")
    assert report.sound
    assert {(f.kind, f.file) for f in report.notes} == {
        ("partial", "commits/.000000.json.ab12.partial"),
        ("stray", "notes.txt"),
    }
    remove_left_overs(cache, report)
    assert not (cache / "commits" / ".000000.json.ab12.partial").exists()
    assert {f.kind for f in report.notes} == {"removed", "stray"}


def test_metadata_is_rebuilt_without_extraction(cache: Path, store: str) -> None:
    names = ["zarr.json", "tokens/zarr.json"] if store == "zarr" else ["index/000000-01.index", "index/000002-00.index"]
    expected = [(cache / name).read_bytes() for name in names]
    (cache / names[0]).unlink()
    (cache / names[1]).write_bytes(b"{}")
    report = verify(cache, "quick")
    assert {f.file for f in report.findings} == set(names)
    assert report.damaged_shards() == []
    mend(cache, report)
    assert [(cache / name).read_bytes() for name in names] == expected


def test_the_index_of_another_tar_is_rebuilt_without_extraction(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache", make_header("webdataset"), TOMBSTONES)
    shutil.copy(path / "index/000001-01.index", path / "index/000000-01.index")
    with pytest.raises(CacheDamage, match=r"shard 0, sample [01], view 1"):
        reads_all(path)
    report = verify(path, "full", source=Photos())
    assert {(f.kind, f.file) for f in report.findings} == {("uncovered", "index/000000-01.index")}
    assert report.counts["records"] == 18  # the view was scanned twice
    mend(path, report)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (0, -1, "does not hold 000000001"),
        (0, 1 << 40, "ends before or within 000000001"),
        (0, 512, "the safetensors header of 000000001 differs"),
        (1, 1 << 40, "ends before or within 000000001"),
        (2, 512, "the safetensors header of 000000001 differs"),
        (3, 9, "is not what was written"),
    ],
)
def test_an_index_that_misplaces_a_record_is_rebuilt(tmp_path: Path, field: int, value: int, message: str) -> None:
    """Its own checksum is right: someone wrote it so."""
    path = make_cache(tmp_path / "cache", make_header("webdataset"), TOMBSTONES)
    file = path / "index/000000-01.index"
    rows = np.frombuffer(file.read_bytes()[:-4], "<i8").reshape(-1, 4).copy()
    rows[1, field] = value
    file.write_bytes(rows.tobytes() + checksum(rows.tobytes()))
    with pytest.raises(CacheDamage, match=f"shard 0, sample 1, view 1: .*{message}"):
        open_cache(path).read(1, 1)
    report = verify(path, "full")
    assert [(f.kind, f.file) for f in report.findings] == [("uncovered", "index/000000-01.index")]
    mend(path, report)


def test_a_safetensors_header_of_another_layout_is_found(tmp_path: Path) -> None:
    """No byte is taken from it, and other libraries trust it: readers refuse what verification would."""
    path = make_cache(tmp_path / "cache", make_header("webdataset"), TOMBSTONES)
    file = path / "shards/000001-00.tar"
    content = file.read_bytes()
    at = content.index(b'"attention"')
    file.write_bytes(content[:at] + b'"attentiom"' + content[at + 11 :])
    commit = Commit.from_bytes((path / "commits/000001.json").read_bytes())
    write_commit(path, commit.model_copy(update={"files": {name: hash_file(path / name) for name in commit.files}}))
    with pytest.raises(CacheDamage, match=r"sample 4, view 0: .*the safetensors header of 000000004 differs"):
        open_cache(path).read(4, 0)
    report = verify(path, "full")
    assert [(f.kind, f.sample, f.view) for f in report.findings] == [("record", 4, 0)]
    mend(path, report)


def test_a_tar_whose_index_is_lost_still_reads(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache", make_header("webdataset"), TOMBSTONES)
    shutil.rmtree(path / "index")
    reads_all(path)


def test_repair_extracts_what_is_damaged_and_nothing_else(tmp_path: Path, store: str) -> None:
    cache = make_cache(tmp_path / "cache", make_header(store, summary="class"), TOMBSTONES)
    before = {f: f.read_bytes() for f in cache.rglob("*") if f.is_file() and "commits" not in f.parts}
    file = target_of(cache, "attention", 2, 0)
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    mend(cache, verify(cache, "full"))
    assert {f: f.read_bytes() for f in before} == before


@pytest.mark.parametrize("level", ["quick", "full"])
def test_threads_find_the_same_in_the_same_order(cache: Path, level: str) -> None:
    for shard, view in ((2, 1), (0, 0)):
        file = target_of(cache, "attention", shard, view)
        file.write_bytes(file.read_bytes()[:-3])
    one, many = (verify(cache, level, source=Photos(changed=7), threads=n) for n in (1, 3))  # type: ignore[arg-type]
    assert one.findings == many.findings
    assert len(one.findings) >= 2
    assert one.counts == many.counts


def test_a_thread_that_fails_ends_the_verification(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without threads: what no finding covers is raised, not lost."""

    def key(self: Photos, index: int) -> str:
        raise RuntimeError(f"key {index}")

    monkeypatch.setattr(Photos, "key", key)
    with pytest.raises(RuntimeError, match="key 0"):
        verify(cache, "full", source=Photos(), threads=2)


def test_progress_is_told(cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    verify(cache, "quick", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_an_unfinished_cache_is_not_sound(tmp_path: Path, store: str) -> None:
    header = make_header(store)
    create_cache(tmp_path, header)
    report = verify(tmp_path, "full")
    assert [(f.kind, f.shard) for f in report.findings] == [("missing", 0), ("missing", 1), ("missing", 2)]


def test_no_cache_can_not_be_verified(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"no cache\.json"):
        verify(tmp_path)
