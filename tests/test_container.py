"""The Dockerfile's steps without Docker: what it copies is enough to build, install and start the program."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

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


def test_the_image_has_the_python_that_the_project_asks_for() -> None:
    text = (ROOT / "Dockerfile").read_text()
    version = re.search(r"^FROM python:(\d+)\.(\d+)-slim$", text, flags=re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = re.fullmatch(r">=(\d+)\.(\d+)", project["requires-python"])
    assert version is not None
    assert wanted is not None
    assert tuple(map(int, version.groups())) >= tuple(map(int, wanted.groups()))


def test_the_image_installs_by_the_constraints() -> None:
    (line,) = re.findall(r"^RUN python -m pip install (.*?) &&", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    assert line.endswith("--constraint constraints.txt .")


def test_what_is_copied_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    lines = re.findall(r"^COPY (.*) \S+$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    sources = " ".join(lines).split()
    assert len(sources) >= 9
    assert not [source for source in sources for pattern in ignored if fnmatch.fnmatch(source, pattern)]
