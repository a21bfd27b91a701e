"""Extraction straight into a bucket, and verification there: the cache that a local folder would get, at every stop."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import cli
from pipeline.cache.remote import copying, objects
from pipeline.errors import CacheError, ConfigError, StorageError
from stages import cache_copy, extract_teacher_features
from stages.extract_teacher_features import ExtractConfig
from tests import forked
from tests.servers import FilesServer, upload
from tests.test_stages.conftest import extract_config


@pytest.fixture
def url(s3: str, tmp_path: Path) -> str:
    return f"s3://bucket/{tmp_path.parent.name}/{tmp_path.name}"


def keys_of(images: Path, url: str, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    keys: dict[str, Any] = extract_config(images, Path("x"), **changes).model_dump(mode="json")
    keys["cache"] |= {"path": url, "local": str(tmp_path / "local")}
    return keys


def extract(images: Path, url: str, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return extract_teacher_features.run(ExtractConfig.model_validate(keys_of(images, url, tmp_path, **changes)))


def content(folder: Path) -> dict[str, Any]:
    """Every file; of commit records what doesn't say when they were made."""
    found: dict[str, Any] = {}
    for file in folder.rglob("*"):
        if file.is_file() and file.name != "README.md":
            found[file.relative_to(folder).as_posix()] = file.read_bytes()
    for name in [name for name in found if name.startswith("commits/")]:
        found[name] = {key: value for key, value in json.loads(found[name]).items() if key not in ("times", "digest")}
    return found


def fetched(url: str, tmp_path: Path) -> dict[str, Any]:
    cache_copy.run(cache_copy.CacheCopyConfig.model_validate({"source": url, "target": str(tmp_path / "back")}))
    return content(tmp_path / "back")


def left(tmp_path: Path) -> list[str]:
    """Files of shards in the local folder."""
    found = (tmp_path / "local").rglob("*")
    return [path.name for path in found if path.is_file() and path.name not in ("cache.json", "zarr.json")]


def test_extraction_into_a_bucket_gives_the_local_cache(
    cache: Path, image_tree: Path, url: str, tmp_path: Path
) -> None:
    facts = extract(image_tree, url, tmp_path, cache__store=cache.name)
    assert (facts["cache"], facts["shards"]) == (url, "3 of 3")
    assert fetched(url, tmp_path) == content(cache)
    assert left(tmp_path) == []
    assert extract(image_tree, url, tmp_path, cache__store=cache.name)["images"] == 0
    with pytest.raises(CacheError, match=rf"{url} holds another cache: views.count"):
        extract(image_tree, url, tmp_path, cache__store=cache.name, views={"count": 1, "image_size": 64})


# Ends without any handler at its n-th upload.
KILLED = """
import json, os, sys
from pipeline.cache.remote.objects import Objects
from stages.extract_teacher_features import ExtractConfig, run

count, upload = iter(range(1, int(sys.argv[1]))), Objects.upload
Objects.upload = lambda *words: os._exit(9) if next(count, None) is None else upload(*words)
run(ExtractConfig.model_validate(json.loads(sys.argv[2])))
"""


@pytest.mark.parametrize("cache", ["webdataset"], indirect=True)
def test_a_run_that_is_killed_goes_on(cache: Path, image_tree: Path, url: str, tmp_path: Path) -> None:
    keys = keys_of(image_tree, url, tmp_path, cache__store=cache.name)
    for moment in (1, 4):
        assert forked.run([sys.executable, "-c", KILLED, str(moment), json.dumps(keys)]).returncode == 9
    facts = extract(image_tree, url, tmp_path, cache__store=cache.name)
    assert facts["shards"] == "3 of 3"
    assert fetched(url, tmp_path) == content(cache)
    assert left(tmp_path) == []


def test_a_shard_that_waits_for_its_upload_is_not_extracted_again(
    image_tree: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copying.Copying.copy

    def fails(self: copying.Copying, shard: int, dry: bool = False) -> Any:
        if shard == 1:
            raise StorageError("the server is down")
        return copy(self, shard, dry)

    with monkeypatch.context() as patch:
        patch.setattr(copying.Copying, "copy", fails)
        with pytest.raises(StorageError, match="the server is down"):
            extract(image_tree, url, tmp_path)
    facts = extract(image_tree, url, tmp_path)
    assert facts["shards"] == "3 of 3"
    assert facts["images"] < 8 + 1  # of shard 2 at most, and none of shard 1
    assert left(tmp_path) == []


def test_several_teachers_and_a_range_of_shards(image_tree: Path, url: str, tmp_path: Path) -> None:
    teacher = {"spec": "timm:test_vit", "weights": "random", "image_size": 64}
    changes = {"teacher": None, "teachers": {"a": teacher, "b": teacher}, "views": {"count": 1, "image_size": 64}}
    checked = ExtractConfig.model_validate(keys_of(image_tree, url, tmp_path, **changes))
    assert extract_teacher_features.run(checked, init_only=True)["extracted"] == 0
    facts = extract_teacher_features.run(checked, shard_range="1:2")
    assert (facts["a.shards"], facts["b.shards"]) == ("1 of 3", "1 of 3")


def test_the_room_is_that_of_all_processes_of_a_machine(
    image_tree: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process has two shards of 8 samples on their way; all 24 samples are never counted twice."""
    needed = list[int]()

    def refuse(path: Path, size: int) -> None:
        needed.append(size)
        raise CacheError("no room")

    monkeypatch.setattr(extract_teacher_features, "require_room", refuse)
    for processes in ("1", "2", "8"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        with pytest.raises(CacheError, match="no room"):
            extract(image_tree, url, tmp_path)
    assert [size / needed[0] for size in needed] == [1, 1.5, 1.5]


def test_a_url_that_takes_no_files_is_refused(image_tree: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"https://host/clip can't be written to by this command: s3:// and gs:// can"
    ):
        extract(image_tree, "https://host/clip", tmp_path)


def verified(url: str, *words: str) -> dict[str, Any]:
    done = CliRunner().invoke(cli.main, ["verify-cache", url, "--json", *words])
    report: dict[str, Any] = json.loads(done.output)
    assert done.exit_code == (0 if report["sound"] else 1)
    return report


def large(cache: Path, shard: int, view: int = 1) -> str:
    return f"tokens/c.{shard}.{view}.0.0" if cache.name == "zarr" else f"shards/{shard:06d}-{view:02d}.tar"


@pytest.mark.parametrize("level", ["quick", "full"])
def test_a_cache_is_verified_behind_its_url(
    level: str, cache: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with FilesServer(cache).running() as server:
        report = verified(server.url, "--level", level)
        assert report["sound"]
        local = json.loads(
            CliRunner().invoke(cli.main, ["verify-cache", str(cache), "--json", "--level", level]).output
        )
        assert report["counts"] == local["counts"]
        read = [path for path, _, _ in server.requests if path.startswith(("tokens/c", "shards/"))]
        assert bool(read) == (level == "full")
        server.fault = lambda path, count: "404" if path == large(cache, 1) else None
        findings = verified(server.url, "--level", level)["findings"]
        assert {(finding["kind"], finding["shard"]) for finding in findings} == {("file", 1)}
        assert all("is missing" in finding["message"] for finding in findings)
        server.fault = lambda path, count: "404" if path == "commits/000002.json" else None
        assert [finding["kind"] for finding in verified(server.url, "--level", level)["findings"]] == ["missing"]
    assert not list((tmp_path / "mrmae").iterdir())


def test_every_damage_behind_a_url_is_that_of_the_local_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file flipped, one too long and one gone, two of them in one shard; a sound shard is read once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    damaged = Path(shutil.copytree(cache, tmp_path / "damaged"))
    flipped = damaged / large(cache, 1)
    content = bytearray(flipped.read_bytes())
    content[1000] ^= 1
    flipped.write_bytes(content)
    with (damaged / large(cache, 1, view=0)).open("ab") as file:
        file.write(b"more")
    (damaged / large(cache, 2)).unlink()
    with FilesServer(damaged).running() as server:
        findings, local = verified(server.url)["findings"], verified(str(damaged))["findings"]
        paths = [path for path, _, _ in server.requests]
    assert sorted(finding["message"] for finding in findings) == sorted(finding["message"] for finding in local)
    assert {large(cache, 1), large(cache, 1, view=0), large(cache, 2)} <= {finding["file"] for finding in findings}
    assert (paths.count(large(cache, 0)), paths.count(large(cache, 1))) == (1, 2)


@pytest.mark.parametrize("cache", ["webdataset"], indirect=True)
@pytest.mark.parametrize("fault", ["flip", "truncate"])
def test_damage_behind_a_url_is_a_finding(
    fault: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with FilesServer(cache).running() as server:
        server.fault = lambda path, count: fault if path == large(cache, 2) else None
        findings = verified(server.url)["findings"]
        assert {finding["shard"] for finding in findings} == {2}
        problem = "doesn't arrive whole: it ends at byte" if fault == "truncate" else "is not what was written"
        assert f"shard 2: {large(cache, 2)} {problem}" in findings[0]["message"]
        server.fault = lambda path, count: fault if path == "commits/000001.json" else None
        assert [finding["shard"] for finding in verified(server.url)["findings"]] == [1]
        # On the way alone: looked at once more.
        seen = set[str]()
        server.fault = lambda path, count: fault if path == large(cache, 0) and not _had(seen, path) else None
        assert verified(server.url)["sound"]


def _had(seen: set[str], path: str) -> bool:
    had = path in seen
    seen.add(path)
    return had


@pytest.mark.parametrize("cache", ["webdataset"], indirect=True)
def test_a_bucket_is_verified(cache: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    upload(cache, url)
    assert verified(url)["sound"]
    objects.Objects(url).remove("commits/000000.json")
    report = verified(url, "--level", "quick")
    assert [finding["kind"] for finding in report["findings"]] == ["missing"]
