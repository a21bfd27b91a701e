"""docs/first-hour.md, as it stands, on 300 real photos: every command, within ten minutes on two CPU cores."""

import os
import resource
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tests.test_docs import ROOT, calls_in, code_blocks

MINUTES = 10


def cut(tars: list[Path], folder: Path, count: int) -> None:
    """`count` photos, evenly spread over the tars, as class folders."""
    labelled: list[tuple[str, str, bytes]] = []
    for file in tars:
        with tarfile.open(file) as tar:
            members = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
            contents = {name: stream.read() for name, stream in members.items() if stream}
        for name, content in contents.items():
            if name.endswith(".jpg"):
                key = name.removesuffix(".jpg")
                labelled.append((contents[f"{key}.cls"].decode().strip(), Path(key).name, content))
    for number in range(count):
        label, key, content = labelled[number * len(labelled) // count]
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
        (folder / f"class{label}" / f"{key}.jpg").write_bytes(content)


@pytest.mark.slow
def test_the_first_hour_takes_ten_minutes(real_data: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The teacher is a local one here. Prints wall and CPU seconds of each command: -s shows them."""
    cut(sorted((real_data / "imagenette224").glob("train-*.tar")), tmp_path / "photos", 300)
    weights = real_data / "teachers/vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    local = f"teacher.spec=timm:vit_tiny_patch16_224 teacher.weights={weights}"
    (shell,) = code_blocks(ROOT / "docs/first-hour.md", "sh")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert "teacher.spec=dino_vits16" in shell
    cores = os.sched_getaffinity(0)
    request.addfinalizer(lambda: os.sched_setaffinity(0, cores))
    os.sched_setaffinity(0, sorted(cores)[:2])
    seconds = 0.0
    for line in calls_in(shell):
        call = line.replace("mrmae ", f"{sys.executable} -m cli ", 1).replace("teacher.spec=dino_vits16", local)
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(["bash", "-c", call], cwd=tmp_path, env=environment, capture_output=True, text=True)
        after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
        assert done.returncode == 0, done.stderr
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        sys.stdout.write(f"{' '.join(line.split()[:2])}: {wall:.0f} s, CPU {cpu:.0f} s\n{done.stdout}")
        seconds += wall
    assert (tmp_path / "runs/report.html").is_file()
    assert seconds < MINUTES * 60
