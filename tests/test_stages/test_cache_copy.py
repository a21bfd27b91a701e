"""`cache-copy`: the same tree at the other end, whenever it is stopped, and no damage that goes unseen."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args
from uuid import uuid4

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import DatasetCard

import cli
from pipeline.cache import QuantiserName, open_cache, open_writer, verify
from pipeline.cache.remote import copying, objects
from pipeline.errors import CacheDamage, CacheError, ConfigError
from stages import cache_copy
from stages.cache_copy import CacheCopyConfig
from tests.servers import FilesServer
from tests.test_pipeline.cache.samples import STORES, SUMMARIES, make_cache, make_header, make_shard


@pytest.fixture(params=STORES)
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """10 samples in 3 shards, 2 views; sample 5 is a tombstone."""
    return make_cache(tmp_path / "cache", make_header(request.param), {5: "cannot identify image file"})


def copy(source: Path | str, target: Path | str, **options: object) -> dict[str, object]:
    return cache_copy.run(CacheCopyConfig.model_validate({"source": str(source), "target": str(target)} | options))


def content(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != "README.md"
    }


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def large(cache: Path, shard: int) -> Path:
    return cache / (f"tokens/c.{shard}.1.0.0" if (cache / "tokens").exists() else f"shards/{shard:06d}-01.tar")


@pytest.mark.parametrize("moments", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_and_run_again_it_gives_the_same_tree(moments: int, cache: Path, tmp_path: Path) -> None:
    reads: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying.Folder, "blocks", _halves(lambda: reads.append(1)))
        copy(cache, tmp_path / "whole")
    for number, moment in enumerate(np.linspace(len(reads) / 4, len(reads) - 1, moments)):
        target = tmp_path / f"copy{number}"
        assert _exit_code_of_copy(int(moment), cache, target) == 9
        assert len(list(target.glob("commits/*.json"))) < 3
        copy(cache, target)
        assert content(target) == content(cache)


def _halves(before: Callable[[], None]) -> Callable[[copying.Folder, str, int], Iterator[bytes]]:
    """Reads of a file in two blocks; `before` is called before each."""

    def blocks(self: copying.Folder, name: str, size: int) -> Iterator[bytes]:
        data = (self.root / name).read_bytes()
        for half in (data[: size // 2], data[size // 2 :]):
            before()
            yield half

    return blocks


def _exit_code_of_copy(moment: int, cache: Path, target: Path) -> int:
    """Copy in a process that ends with code 9 before its read number `moment`, without any handler."""
    pid = os.fork()
    if not pid:
        try:
            count = iter(range(1, moment))
            end = _halves(lambda: None if next(count, None) else os._exit(9))
            copying.Folder.blocks = end  # type: ignore[method-assign,assignment]
            copy(cache, target)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_to_a_bucket_and_back_gives_the_same_tree(cache: Path, s3: str, tmp_path: Path) -> None:
    url = f"s3://bucket/{uuid4()}"
    facts = copy(cache, url)
    assert facts["shards"] == "3 of 3"
    assert copy(cache, url)["copied"] == 0
    copy(url, tmp_path / "back")
    assert content(tmp_path / "back") == content(cache)
    assert (tmp_path / "back/README.md").is_file()
    report = verify(tmp_path / "back", "full")
    assert report.sound
    assert not report.notes


def test_what_a_bucket_says_is_understood(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_PAUSES", (0.001,))
    place = objects.Objects("s3://bucket/small")
    place.write("a", b"hello")
    assert place.read("a", 1, 4) == b"ell"
    assert (place.size("a"), place.size("b")) == (5, None)
    for start in (3, 5):
        with pytest.raises(CacheDamage, match=r"it ends"):
            place.read("a", start, 9)
    with pytest.raises(FileNotFoundError):
        place.read("b", 0, 1)
    with pytest.raises(CacheError, match=r"no cache\.json"):
        copy("s3://no-such-bucket/clip", tmp_path / "b")


def test_damage_in_a_bucket_is_found_and_replaced(cache: Path, s3: str, tmp_path: Path) -> None:
    url = f"s3://bucket/{uuid4()}"
    copy(cache, url)
    flip(large(cache, 1))
    objects.Objects(url).upload(large(cache, 1).relative_to(cache).as_posix(), large(cache, 1))
    flip(large(cache, 1))
    with pytest.raises(CacheError, match=r"1 shards are not copied, the first is shard 1: .*commit record states"):
        copy(url, tmp_path / "back")
    assert copy(cache, url)["copied"] == 0  # the length is right
    assert copy(cache, url, full=True)["copied"] > 0
    copy(url, tmp_path / "back")
    assert content(tmp_path / "back") == content(cache)


def test_damage_at_the_source_is_named_and_all_else_copied(cache: Path, tmp_path: Path) -> None:
    flip(large(cache, 2))
    with pytest.raises(CacheError, match=r"1 shards are not copied, the first is shard 2: .*mend SRC by `mrmae verify"):
        copy(cache, tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "b/commits").iterdir()) == ["000000.json", "000001.json"]
    assert not large(tmp_path / "b", 2).exists()
    assert not (tmp_path / "b/README.md").exists()


def test_damage_at_the_target_is_found_by_full(cache: Path, tmp_path: Path) -> None:
    copy(cache, tmp_path / "b")
    flip(large(tmp_path / "b", 1))
    assert copy(cache, tmp_path / "b", dry_run=True)["to_copy"] == 0
    assert copy(cache, tmp_path / "b", dry_run=True, full=True)["to_copy"] > 0
    copy(cache, tmp_path / "b", full=True)
    assert content(tmp_path / "b") == content(cache)


@pytest.mark.parametrize("fault", ["flip", "truncate"])
def test_a_server_that_lies_is_caught(fault: str, cache: Path, tmp_path: Path) -> None:
    name = large(cache, 0).relative_to(cache).as_posix()
    with FilesServer(cache).running() as server:
        server.fault = lambda path, count: fault if path == name else None
        with pytest.raises(CacheError, match=r"1 shards are not copied, the first is shard 0: "):
            copy(server.url, tmp_path / "b")
        server.fault = lambda path, count: None
        copy(server.url, tmp_path / "b")
    assert content(tmp_path / "b") == content(cache)


def test_a_dry_run_writes_nothing(cache: Path, tmp_path: Path) -> None:
    total = sum(len(data) for name, data in content(cache).items() if name.startswith(("tokens/", "shards/")))
    assert copy(cache, tmp_path / "b", dry_run=True)["to_copy"] >= total
    assert not (tmp_path / "b").exists()


def test_some_shards(cache: Path, tmp_path: Path) -> None:
    assert copy(cache, tmp_path / "b", shards="1:3")["shards"] == "2 of 3"
    assert sorted(path.name for path in (tmp_path / "b/commits").iterdir()) == ["000001.json", "000002.json"]
    with pytest.raises(ConfigError, match=r"--shards 2:9: give A:B with 0 <= A < B <= 3"):
        copy(cache, tmp_path / "b", shards="2:9")


def test_a_shard_that_was_repaired_is_copied_again(cache: Path, tmp_path: Path) -> None:
    copy(cache, tmp_path / "b")
    writer = open_writer(cache)
    writer.write_shard(1, make_shard(writer.header, 1))  # its tombstone lives
    copy(cache, tmp_path / "b", full=True)
    assert content(tmp_path / "b") == content(cache)


def test_another_cache_at_the_target_is_refused(cache: Path, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", make_header("zarr", samples_per_shard=5))
    with pytest.raises(CacheError, match=r"holds another cache"):
        copy(cache, other)


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ("https://host/clip", "can't be written to by this command: s3:// and gs:// can"),
        ("hf://datasets/owner/clip", "hf upload-large-folder"),
    ],
)
def test_places_that_take_no_files_are_refused(target: str, line: str, cache: Path) -> None:
    with pytest.raises(ConfigError, match=line):
        copy(cache, target)


def test_both_sides_remote_is_refused(s3: str) -> None:
    with pytest.raises(ConfigError, match=r"both remote: copy to a local folder first"):
        copy("s3://bucket/a", "s3://bucket/b")


def test_the_card_is_one_of_the_hub(cache: Path, tmp_path: Path) -> None:
    copy(cache, tmp_path / "b", license="cc-by-4.0")
    text = (tmp_path / "b/README.md").read_text()
    card = DatasetCard(text)
    assert card.data.license == "cc-by-4.0"
    assert yaml.safe_load(text.split("---")[1])["task_categories"] == ["image-feature-extraction"]
    fingerprint = json.loads((cache / "cache.json").read_text())["fingerprint"]
    for part in (fingerprint, "fake", "| views | count 2, seed 3", "mrmae verify-cache", "1 of them unreadable"):
        assert part in text
    (tmp_path / "b/README.md").write_text("edited")
    copy(cache, tmp_path / "b")
    assert (tmp_path / "b/README.md").read_text() == "edited"


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)  # webdataset's
@pytest.mark.parametrize("summary", SUMMARIES)
@pytest.mark.parametrize("name", get_args(QuantiserName))
@pytest.mark.parametrize("store", STORES)
def test_what_the_card_says_of_reading_is_so(store: str, name: str, summary: str | None, tmp_path: Path) -> None:
    if summary and name == "codes":
        pytest.skip("codes keep no class token")
    header = make_header(store, quantiser_name=name, summary=summary)
    make_cache(tmp_path / "a", header)
    copy(tmp_path / "a", tmp_path / "b")
    text = (tmp_path / "b/README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    stored, *dequantised = [run_code(block.replace("PATH", str(tmp_path / "b"))) for block in blocks]
    assert f"[{', '.join(map(str, stored['tokens'].shape))}]" in blocks[0]
    assert (f"Tokens are {name}" in text) == (name in ("int8", "int4", "codes"))
    assert ("class token" in text) == (summary is not None)
    assert ("summary_mean" in text) == (summary is not None and name in ("int8", "int4"))
    assert len(dequantised) == (name in ("int4", "codes"))
    for names in dequantised:
        record, expected = (open_cache(tmp_path / "a").read(0, 0, dequantise=features) for features in (False, True))
        found = names["tokens"] if name == "int4" else names["features"][record.tokens[:, 0]]
        np.testing.assert_allclose(found, expected.tokens, rtol=1e-6)


def run_code(block: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(block, names)
    return names


def test_the_command_line(cache: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.main, ["cache-copy", str(cache), str(tmp_path / "b"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["shards"] == "3 of 3"
    done = CliRunner().invoke(cli.main, ["cache-copy", str(tmp_path / "none"), str(tmp_path / "c")])
    assert done.exit_code == 2
    assert "no cache.json" in done.output
