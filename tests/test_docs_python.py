"""Every Python block of the documents is run: it imports what is there, and says the right shapes in its comments."""

from functools import partial
from typing import Any

import pytest
import timm
import torch

import pipeline.teachers
from pipeline.teachers import build_teacher, registry
from tests.test_docs import DOCUMENTS, ROOT, code_blocks

# Blocks that other tests run, or that are a piece of a file.
ELSEWHERE = {"cache-format.md": "tests/test_pipeline/cache/test_format.py::test_the_documented_example_runs"}
FRAGMENT = '"dinov3_vitb16": Entry('


def test_every_block_is_run() -> None:
    named = {file.name for file in DOCUMENTS if code_blocks(file, "python")}
    assert named == {*ELSEWHERE, "students.md", "teachers.md"}
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


def test_the_entry_of_a_new_teacher() -> None:
    (block,) = [one for one in code_blocks(ROOT / "docs/teachers.md", "python") if FRAGMENT in one]
    entries = eval(f"{{{block}}}", vars(registry))
    (entry,) = entries.values()
    assert isinstance(entry, registry.Entry)
    assert timm.is_model(entry.spec.removeprefix("timm:").partition(".")[0])
