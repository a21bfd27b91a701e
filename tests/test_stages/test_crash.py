"""Extraction killed with SIGKILL at random moments, by turns with one process and two: the bytes come out the same."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.cache import open_cache
from stages import extract_teacher_features, verify_cache
from tests.pictures import smooth_picture
from tests.test_stages.conftest import extract_config
from tests.test_stages.test_extract_teacher_features import content

ROOT = Path(__file__).parents[2]
KILLS = 20
IMAGES = 600  # a shard each


def start(processes: int, images: Path, cache: Path, wanted: dict[str, Any]) -> "subprocess.Popen[bytes]":
    """`extract-teacher-features` in a process group of its own."""
    keys = ", ".join(f"{key}: {json.dumps(value)}" for key, value in wanted.items())
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [
        sys.executable, *run, "-m", "cli", "extract-teacher-features", f"data={{path: {images}, workers: 1}}",
        "teacher={spec: timm:test_vit, weights: random, image_size: 64}",
        "views={count: 2, image_size: 64}", "batch_size=16",
        f"cache={{path: {cache}, {keys}}}",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def kill_all(pid: int) -> None:
    """SIGKILL to the launcher, its processes and their workers: the launcher's group holds only itself."""
    launcher = psutil.Process(pid)
    for process in (launcher, *launcher.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def committed(cache: Path) -> int:
    return len(list((cache / "commits").glob("*.json"))) if (cache / "commits").is_dir() else 0


@pytest.mark.slow  # starts Python and torch 20 times for each kind of cache
@pytest.mark.parametrize(
    "wanted",
    [
        {"store": "zarr", "summary": True},
        {"store": "webdataset", "summary": True},
        {"store": "zarr", "quantiser": "codes", "clusters": 16},
    ],
    ids=["zarr", "webdataset", "codes"],
)
def test_killed_and_resumed_extraction_gives_the_same_bytes(tmp_path: Path, wanted: dict[str, Any]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(IMAGES):
        smooth_picture(number, 48 + number % 30, 70).save(images / f"{number:03d}.jpg")
    wanted = {"samples_per_shard": 1, **wanted}
    keys = {f"cache__{key}": value for key, value in wanted.items()}
    extract_teacher_features.run(extract_config(images, tmp_path / "whole", **keys))

    cache, moments = tmp_path / "killed", random.Random(0)
    kills = 0
    while kills < KILLS:
        process = start(1 + kills % 2, images, cache, wanted)
        # Wait until this start has got somewhere, then strike at a random moment of its work; every fifth time
        # at any moment, so also during start-up and the creation of the cache.
        before, deadline = committed(cache), time.monotonic() + 120
        if kills % 5:
            while committed(cache) == before and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.002)
        else:
            time.sleep(moments.uniform(0.5, 4.0))
        time.sleep(moments.uniform(0.0, 0.05))
        assert process.poll() is None, f"done after {kills} kills, before the next could strike: give it more images"
        kill_all(process.pid)
        process.wait()
        kills += 1

    extract_teacher_features.run(extract_config(images, cache, **keys))
    assert open_cache(cache).missing_shards() == []
    assert content(cache) == content(tmp_path / "whole")
    assert verify_cache.run(verify_cache.VerifyConfig(path=cache)).sound
