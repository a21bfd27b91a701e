"""The Dockerfile's steps without Docker: what it copies is enough to build, install and start the program."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def copied(place: Path) -> Path:
    """Do the COPY lines below `place`, as if it were the root of the container; returns the folder of sources."""
    folder = place
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("WORKDIR "):
            folder = place / line.split()[1].lstrip("/")
            folder.mkdir(parents=True, exist_ok=True)
        elif line.startswith("COPY "):
            *sources, target = line.split()[1:]
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, folder / target)
    return place / "src"


def test_what_is_copied_installs_and_starts(tmp_path: Path) -> None:
    sources = copied(tmp_path / "root")
    assert (tmp_path / "root/work/configs/imagenet.yaml").is_file()
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    built = subprocess.run([sys.executable, "-c", build], cwd=sources, capture_output=True, text=True, check=True)
    wheel = zipfile.ZipFile(sources / built.stdout.splitlines()[-1])
    names = set(wheel.namelist())
    expected = {str(file.relative_to(ROOT)) for folder in ("pipeline", "stages", "benchmarks")
                for file in (ROOT / folder).rglob("*.py")} | {"cli.py"}  # fmt: skip
    assert expected <= names
    site = tmp_path / "site"
    wheel.extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    work = tmp_path / "root/work"
    code = "import cli, pipeline; print(cli.__file__, pipeline.__file__); cli.main(['--help'])"
    origin = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=work, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert origin.stdout.splitlines()[0].count(str(site)) == 2
    assert "extract-teacher-features" in origin.stdout


@pytest.mark.parametrize("name", ["python", "constraints.txt"])
def test_the_image_has_what_the_project_asks_for(name: str) -> None:
    text = (ROOT / "Dockerfile").read_text()
    if name == "python":
        version = re.search(r"^FROM python:(\d+)\.(\d+)-slim$", text, flags=re.MULTILINE)
        assert version is not None
        assert (int(version[1]), int(version[2])) >= (3, 11)
    else:
        assert "--constraint constraints.txt" in text
