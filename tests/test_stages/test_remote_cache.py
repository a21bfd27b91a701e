"""Stages with a cache behind a URL: the same training as from a local copy, and clear refusals."""

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import cli
from pipeline.assembly.caches import place_of
from pipeline.cache import open_mirror
from pipeline.cache.remote import objects
from pipeline.configs.cache import CacheInput
from pipeline.errors import CacheError
from stages import pretrain
from tests.servers import FilesServer, upload
from tests.test_pipeline.cache.remote.test_remote import local_bytes
from tests.test_stages.conftest import MICRO, pretrain_config
from tests.test_stages.test_processes import forked_ranks


def inputs(cache: Path, images: Path, url: str, tmp_path: Path, workers: int, **keys: Any) -> dict[str, Any]:
    data = {"path": str(images)} if cache.name == "zarr" else {}
    return {
        "cache": {"path": url, "local": str(tmp_path / "local"), **keys},
        "data": data | {"workers": workers},
        "order": {"kind": "block", "window": 1},
    }


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(max((output / "checkpoints").glob("step-*")) / "model.safetensors")


def train(output: Path, **changes: Any) -> dict[str, torch.Tensor]:
    pretrain.run(pretrain_config(output, **changes))
    return weights(output)


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_training_from_s3_gives_the_same_bits(cache: Path, image_tree: Path, s3: str, tmp_path: Path) -> None:
    upload(cache, f"s3://bucket/{cache.name}")
    local = inputs(cache, image_tree, str(cache), tmp_path, 0)
    expected = train(tmp_path / "a", **local)
    remote = inputs(cache, image_tree, f"s3://bucket/{cache.name}", tmp_path, 2) | {"checkpoint_every": 3}
    assert equal(train(tmp_path / "b", **remote), expected)
    # Stopped after three steps, it goes on from either.
    for place in (local, remote):
        shutil.rmtree(tmp_path / "b/checkpoints/step-00000006")
        assert equal(train(tmp_path / "b", **place), expected)
    written = "".join(file.read_text() for file in (tmp_path / "b").glob("*.*") if file.is_file())
    assert "s3://bucket" in written
    assert "secret-of-the-test" not in written


@pytest.mark.parametrize("kind", ["full", "block"])
def test_training_by_ranges_gives_the_same_bits(
    kind: str, cache: Path, image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With five in a hundred requests that fail; the default order is that of a local cache."""
    if kind == "block" and cache.name == "zarr":
        pytest.skip("one store is enough for the other order")
    monkeypatch.setattr(objects, "_PAUSES", (0.001,) * 6)
    order = {"order": {"kind": kind, "window": 1}}
    expected = train(tmp_path / "a", **inputs(cache, image_tree, str(cache), tmp_path, 0) | order)
    random = np.random.default_rng(0)
    with FilesServer(cache).running() as server:
        server.fault = lambda path, count: "500" if random.random() < 0.05 else None
        remote = inputs(cache, image_tree, server.url, tmp_path, 2, read="range")
        remote["order"] = {} if kind == "full" else order["order"]
        assert equal(train(tmp_path / "b", **remote), expected)
    assert not list((tmp_path / "local").rglob("*.tar"))
    assert not list((tmp_path / "local").rglob("tokens/c*"))


@pytest.mark.slow  # two processes train twice
def test_two_processes_train_from_s3_as_from_a_local_copy(
    cache: Path, image_tree: Path, s3: str, tmp_path: Path
) -> None:
    url = f"s3://bucket/two-{cache.name}"
    upload(cache, url)
    micro = ", ".join(f"{key}: {value}" for key, value in MICRO.items())
    data = f"data={{path: {image_tree if cache.name == 'zarr' else 'null'}, workers: 1}}"
    for name, place in (("a", str(cache)), ("b", url), ("c", url)):
        ended = forked_ranks(
            2, "pretrain", *([] if cache.name == "webdataset" else [data]), f"cache.path={place}", "data.workers=1",
            f"cache.local={tmp_path}/local", f"cache.read={'range' if name == 'c' else 'shards'}",
            f"student={{{micro}}}", "optim={lr: 1e-3, warmup_epochs: 0}", "batch_size=8", "max_steps=6",
            "tensorboard=false", "order={kind: block, window: 1}", f"output={tmp_path}/{name}",
        )  # fmt: skip
        assert [process.returncode for process in ended] == [0, 0], ended[0].stderr
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_failing_requests_and_a_small_folder_change_nothing(
    cache: Path, image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five in a hundred requests fail; the folder holds two of three shards, so each is fetched again."""
    monkeypatch.setattr(objects, "_PAUSES", (0.001,) * 6)
    expected = train(tmp_path / "a", **inputs(cache, image_tree, str(cache), tmp_path, 0))
    random = np.random.default_rng(0)
    with FilesServer(cache).running() as server:
        server.fault = lambda path, count: "500" if random.random() < 0.05 else None
        place = place_of(CacheInput.model_validate({"path": server.url, "local": str(tmp_path / "local")}))
        limit = room_for_two(place)
        remote = inputs(cache, image_tree, server.url, tmp_path, 1, local_limit=limit)
        with watched(tmp_path / "local") as sizes:
            assert equal(train(tmp_path / "b", **remote), expected)
        # Beside the files of the cache: markers with the names of a shard's files.
        assert 0 < max(sizes) <= limit + 3 * 400
        large = [path for path, _, sent in server.requests if path.startswith(("tokens/", "shards/")) and sent]
        assert len(large) > len(set(large))


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """The bytes of the files of a folder, looked at every ten milliseconds."""
    sizes, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            sizes.append(local_bytes(folder))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield sizes
    finally:
        stop.set()
        watcher.join()


def room_for_two(place: Any) -> int:
    """A limit that two shards fit in, and not three."""
    mirror = open_mirror(place)
    return mirror.metadata_size() + 2 * max(map(mirror.size, range(3))) + 1000


def test_block_order_is_the_default_for_remote_caches(cache: Path, image_tree: Path, tmp_path: Path) -> None:
    with FilesServer(cache).running() as server:
        remote = inputs(cache, image_tree, server.url, tmp_path, 0)
        train(tmp_path / "a", **remote | {"order": {}})
    kinds = [json.loads(file.read_text())["identity"]["order"] for file in (tmp_path / "a").rglob("checkpoint.json")]
    assert kinds == [{"kind": "block", "window": 16}]


def test_a_folder_too_small_for_the_order_is_refused(cache: Path, image_tree: Path, tmp_path: Path) -> None:
    with FilesServer(cache).running() as server:
        place = place_of(CacheInput.model_validate({"path": server.url, "local": str(tmp_path / "local")}))
        limit = f"{room_for_two(place) / 1000 - 1.5:.3f} kB"
        remote = inputs(cache, image_tree, server.url, tmp_path, 0, local_limit=limit)
        with pytest.raises(CacheError, match=r"cache\.local_limit=.* is too little .* smaller order\.window"):
            train(tmp_path / "a", **remote)
        with pytest.raises(CacheError, match=r"set order\.kind=block, or give more"):
            train(tmp_path / "a", **remote | {"order": {"kind": "full"}})


def test_cache_info_reads_a_url(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with FilesServer(cache).running() as server:
        done = CliRunner().invoke(cli.main, ["cache-info", server.url, "--json"])
        local = CliRunner().invoke(cli.main, ["cache-info", str(cache), "--json"])
    assert done.exit_code == 0, done.output
    assert {**json.loads(done.output), "path": ""} == {**json.loads(local.output), "path": ""}
    assert not [path for path, _, _ in server.requests if path.startswith(("tokens/", "shards/"))]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["verify-cache", "s3://bucket/cache", "--repair"],
            "--repair needs a local folder: `mrmae cache-copy s3://bucket/cache FOLDER`, then `mrmae verify-cache "
            "FOLDER --repair`, then `mrmae cache-copy FOLDER s3://bucket/cache --full`",
        ),
        (["verify-cache", "s3://bucket/cache", "--level", "deep"], "--level deep needs a local folder: `mrmae cache-c"),
        (["cache-info", "ftp://host/cache"], "path: ftp:// is not read: give a local folder, s3://"),
        (["cache-info", "s3://key:secret@host/cache"], "a URL with a user, a password or a query is refused"),
        (["cache-info", "https://host/cache?X-Amz-Signature=secret"], "a user, a password or a query is refused"),
        (["cache-info", "hf://owner/name"], "hf:// needs the kind and the name"),
        (["pretrain", "cache.path=ftp://b/c", "output=x"], "cache.path: ftp:// is not read"),
        (["pretrain", "cache.path=s3://b/c", "output=s3://b/run"], "output: s3://b/run is no local path"),
        (
            ["extract-teacher-features", "data.path=x", "teacher.spec=clip_vitb16", "cache.path=ftp://b/c"],
            "cache.path: ftp:// is not read",
        ),
        (
            ["extract-teacher-features", "data.path=s3://b/c", "teacher.spec=clip_vitb16", "cache.path=x"],
            "data.path=s3://b/c: images are read from local paths alone",
        ),
    ],
)
def test_other_urls_are_refused_in_one_line(
    words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.main, words)
    assert done.exit_code == 2
    assert line in done.output
    assert "secret" not in done.output
    assert not list(tmp_path.iterdir())
