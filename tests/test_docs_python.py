"""Every Python block of the documents is run: it imports what is there, and says the right shapes in its comments."""

import os
import subprocess
import sys
import venv
import zipfile
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch

import pipeline.teachers
from pipeline.models import OBJECTIVES
from pipeline.teachers import build_teacher, registry
from tests.test_container import copied
from tests.test_docs import DOCUMENTS, ROOT, code_blocks

# Blocks that other tests run, or that are a piece of a file.
ELSEWHERE = {"cache-format.md": "tests/test_pipeline/cache/test_format.py::test_the_documented_example_runs"}
SMALL, DIM = registry.Entry("timm:test_vit", 224, "small"), 64
FRAGMENT = '"dinov3_vitb16": Entry('


def test_every_block_is_run() -> None:
    named = {file.name for file in DOCUMENTS if code_blocks(file, "python")}
    assert named == {*ELSEWHERE, "python.md", "students.md", "teachers.md"}
    for test in ELSEWHERE.values():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text()


def blocks(name: str) -> list[str]:
    return [block for block in code_blocks(ROOT / "docs" / name, "python") if FRAGMENT not in block]


def test_students() -> None:
    torch.manual_seed(0)
    ids = torch.randperm(196)[None]
    names: dict[str, Any] = {
        "images": torch.randn(1, 3, 224, 224),
        "ids_keep": ids[:, :49],
        "ids_predict": ids[:, 49:98],
        "targets": torch.randn(1, 49, 768),
        "codes": torch.randint(4096, (1, 49)),
    }
    for block in blocks("students.md"):
        exec(block, names)
    assert set(names["losses"]) >= {"loss", "pixel_loss", "mimic_loss"}
    assert names["losses"]["pred"].shape == (1, 147, 768)
    assert names["of_a_share"]["pred"].shape == (1, 49, 768)
    assert 7 < names["of_codes"]["mimic_loss"] < 10  # ln 4096 is 8.3
    assert any(parameter.grad is not None for parameter in names["student"].parameters())


def test_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.teachers, "build_teacher", partial(build_teacher, weights="random"))
    names: dict[str, Any] = {"torch": torch, "views": torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)}
    first, second = blocks("teachers.md")
    exec(first.replace('"cuda"', '"cpu"'), names)
    assert names["output"].tokens.shape == (1, 196, 768)
    assert names["output"].attention.shape == (1, 196)
    exec(second, names)
    assert len(names["outputs"]) == 2
    alone = names["teachers"][1](names["views"])
    torch.testing.assert_close(names["outputs"][1][0], alone[0], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_from_python(image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(registry.TEACHERS, "dino_vits16", SMALL)
    for registered, name in ((registry.TEACHERS, "my_dino"), (registry.TEACHERS, "colours"), (OBJECTIVES, "relations")):
        monkeypatch.setitem(registered, name, None)  # goes again
    (tmp_path / "photos").symlink_to(image_tree)
    script = ModuleType("script")
    monkeypatch.setitem(sys.modules, "script", script)  # timm registers a network by its module
    names = vars(script)
    for block in blocks("python.md"):
        block = block.replace('"teacher.spec=dino_vits16"', '"teacher.spec=dino_vits16", "teacher.weights=random"')
        exec(block.replace("384", str(DIM)), names)
    assert names["metrics"]["loss"] > 0
    assert names["patch_tokens"].shape == (2, 196, 192)
    assert names["record"].tokens.shape == (196, DIM)
    assert names["features"].shape == (2, 192)
    assert names["model"].weight.grad is not None
    assert registry.TEACHERS["my_dino"].image_size == 224
    student, teacher = names["student"], build_teacher("colours")
    views = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert (teacher(views).tokens.shape, teacher(views).attention.shape) == ((2, 16, 48), (2, 16))
    row = registry.describe_teacher("colours")
    assert (row.grid, row.dim, row.image_size, row.has_attention, row.about) == ((4, 4), 48, 64, True, "pixels")
    losses = student(torch.randn(2, 3, 224, 224), torch.arange(49).expand(2, -1), {"colours": torch.randn(2, 49, 48)})
    losses["mimic_loss"].backward()
    assert student.mimic["colours"].head.weight.grad.any()


@pytest.mark.slow
def test_a_users_script_and_this_page_are_checked_strictly(tmp_path: Path) -> None:
    """By mypy, against the wheel, which is installed where nothing of this checkout is."""
    sources, _ = copied(tmp_path / "root")
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    built = subprocess.run([sys.executable, "-c", build], cwd=sources, capture_output=True, text=True, check=True)
    venv.create(tmp_path / "env", with_pip=False)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    with zipfile.ZipFile(sources / built.stdout.splitlines()[-1]) as wheel:
        wheel.extractall(site)
    (site / "libraries.pth").write_text(str(Path(torch.__file__).parents[1]))
    python = tmp_path / "env/bin/python"
    found = subprocess.run(
        [python, "-c", "import pipeline; print(pipeline.__file__)"], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.stdout.startswith(str(site)), found
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\n"
        "from pipeline.cache import open_cache\n"
        "from pipeline.config import load_config\n"
        "from pipeline.models import build_student\n"
        "from stages import pretrain\n"
        "from stages.configs.pretrain import PretrainConfig\n\n"
        "metrics = pretrain.run(load_config(PretrainConfig, Path('chain.yaml'), ['seed=1'], section='pretrain'))\n"
        "count: int = len(open_cache('cache'))\n"
        "dim: int = build_student('mrmae_vit_tiny_patch16', objective='mae').encoder.dim\n"
    )
    (tmp_path / "page.py").write_text("\n".join(blocks("python.md")))
    strictly = [sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull, f"--python-executable={python}"]
    of_both = [*strictly, "--untyped-calls-exclude=torch", "mine.py", "page.py"]  # Tensor.backward has no types
    checked = subprocess.run(of_both, cwd=tmp_path, capture_output=True, text=True)
    assert checked.stdout.strip() == "Success: no issues found in 2 source files", checked.stdout
    with (tmp_path / "mine.py").open("a") as script:
        script.write("wrong: str = dim\n")
    checked = subprocess.run([*strictly, "mine.py"], cwd=tmp_path, capture_output=True, text=True)
    assert "Incompatible types in assignment" in checked.stdout  # the types are really read
    assert checked.stdout.endswith("Found 1 error in 1 file (checked 1 source file)\n")


def test_the_entry_of_a_new_teacher() -> None:
    (block,) = [one for one in code_blocks(ROOT / "docs/teachers.md", "python") if FRAGMENT in one]
    entries = eval(f"{{{block}}}", vars(registry))
    (entry,) = entries.values()
    assert isinstance(entry, registry.Entry)
    assert timm.is_model(entry.spec.removeprefix("timm:").partition(".")[0])
