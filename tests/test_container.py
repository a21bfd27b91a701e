"""The Dockerfile's steps without Docker: what it copies is enough to build, install and start the program."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def copied(place: Path) -> tuple[Path, Path]:
    """Do the COPY lines below `place`, as if it were the root of the container; returns the WORKDIRs.

    The first has the sources, the second is where commands start.
    """
    folders = []
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("WORKDIR "):
            folders.append(place / line.split()[1].lstrip("/"))
            folders[-1].mkdir(parents=True)
        elif line.startswith("COPY "):
            *sources, target = line.split()[1:]
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, folders[-1] / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, folders[-1] / target)
    sources, project = folders
    return sources, project


def modules(folder: Path) -> set[str]:
    """The modules and the entry point, as paths."""
    found = {file for name in ("pipeline", "stages", "benchmarks") for file in (folder / name).rglob("*.py")}
    return {str(file.relative_to(folder)) for file in found} | {"cli.py"}


def test_what_is_copied_starts(tmp_path: Path) -> None:
    """In the copied tree alone, from the folder in which a container's commands start."""
    sources, project = copied(tmp_path)
    assert modules(sources) == modules(ROOT)
    code = (
        f"import sys; sys.path.insert(0, {str(sources)!r}); import cli; "
        "cli.main(['pretrain', '--config', 'configs/imagenet.yaml', '--print-config'])"
    )
    started = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=project, env={**os.environ, "IMAGENET": "/data"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "mrmae_convvit_base_patch16" in started.stdout


def test_every_package_is_installed() -> None:
    """Setuptools takes the folders that pyproject.toml names; the entry point is a function of cli.py."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = project["tool"]["setuptools"]["packages"]["find"]["include"]
    folders = {str(Path(file).parent).replace("/", ".") for file in modules(ROOT) - {"cli.py"}}
    assert not {folder for folder in folders if not any(fnmatch(folder, name) for name in names)}
    assert project["tool"]["setuptools"]["py-modules"] == ["cli"]
    module, function = project["project"]["scripts"]["mrmae"].split(":")
    assert f"def {function}(" in (ROOT / f"{module}.py").read_text()


@pytest.mark.slow
def test_what_is_copied_is_built_and_installed(tmp_path: Path) -> None:
    sources, project = copied(tmp_path / "root")
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    built = subprocess.run([sys.executable, "-c", build], cwd=sources, capture_output=True, text=True, check=True)
    wheel = zipfile.ZipFile(sources / built.stdout.splitlines()[-1])
    assert modules(ROOT) <= set(wheel.namelist())
    site = tmp_path / "site"
    wheel.extractall(site)
    code = "import cli, pipeline; print(cli.__file__, pipeline.__file__); cli.main(['--help'])"
    origin = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=project, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, check=True,
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
    assert line.endswith("--constraint constraints.txt '.[remote]'")


def test_what_is_copied_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    lines = re.findall(r"^COPY (.*) \S+$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    sources = " ".join(lines).split()
    assert len(sources) >= 9
    assert not [source for source in sources for pattern in ignored if fnmatch(source, pattern)]
