"""docs/first-look.ipynb: its cells run in order, without Jupyter, and it is kept without outputs."""

import ast
import json
import re
import shutil
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.teachers import TEACHERS
from tests.test_docs import ROOT

FILE = ROOT / "docs/first-look.ipynb"
NOTEBOOK = json.loads(FILE.read_text())
CELLS = {kind: [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == kind] for kind in ("code", "markdown")}


def text(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_it_is_a_notebook_without_outputs() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    identities = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(identities)) == len(identities) == len(CELLS["code"]) + len(CELLS["markdown"])
    for cell in CELLS["code"]:
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
    assert FILE.read_text() == json.dumps(NOTEBOOK, indent=1, ensure_ascii=False) + "\n"  # as Jupyter writes it


def test_its_links_resolve() -> None:
    links = [link for cell in CELLS["markdown"] for link in re.findall(r"\]\(([^)#]+)", text(cell))]
    assert len(links) >= 4
    for link in links:
        assert (FILE.parent / link).exists(), link


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The names that the cells leave, and what each would show: the value of its last line."""
    script, shown, registered = ModuleType("first_look"), [], dict(TEACHERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "first_look", script)
        patch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("notebook")))
        for cell in CELLS["code"]:
            *body, last = ast.parse(text(cell)).body
            if isinstance(last, ast.Expr):
                exec(compile(ast.Module(body, []), FILE.name, "exec"), vars(script))
                value = eval(compile(ast.Expression(last.value), FILE.name, "eval"), vars(script))
                shown.append(np.asarray(value.convert("L")) if isinstance(value, Image.Image) else value)
            else:
                exec(compile(text(cell), FILE.name, "exec"), vars(script))
        yield vars(script), shown
    TEACHERS.clear()
    TEACHERS.update(registered)
    shutil.rmtree(vars(script)["folder"])


def test_its_figures_are_what_it_says(ran: tuple[dict[str, Any], list[Any]]) -> None:
    names, shown = ran
    facts, attention, losses, top1, neighbours = shown
    assert facts["unreadable"] == 0
    assert list(losses)[-1] == 60
    assert losses[60] < losses[5]
    assert top1["trained"] > 0.6  # chance is a third
    assert names["features"].shape == (72, 96)
    assert (names["nearest"][:, 0] == np.arange(72)).all()
    for picture in (attention, neighbours):
        assert picture.std() > 20


def test_the_teacher_looks_at_the_shape(ran: tuple[dict[str, Any], list[Any]]) -> None:
    names, _ = ran
    attention = np.stack([names["cache"].read(index, view=0).attention for index in range(72)]).astype(np.float32)
    assert np.sort(attention)[:, -16:].sum(1).mean() > 0.5  # a quarter of the cells


def test_it_is_named_by_other_pages() -> None:
    for page in ("README.md", "docs/python.md"):
        assert "first-look.ipynb" in (ROOT / page).read_text()
