"""Pictures are written whole."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.figures import save_figure


def test_a_full_disk_does_not_cost_the_former_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_figure(Figure((1, 1)), tmp_path / "new" / "a.png", dpi=20)
    with Image.open(path) as image:
        assert image.size == (20, 20)
    former = path.read_bytes()

    def fill(_figure: Figure, target: Path, **_keys: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Figure, "savefig", fill)
    with pytest.raises(OSError, match="No space left"):
        save_figure(Figure((1, 1)), path, dpi=20)
    assert path.read_bytes() == former
    assert os.listdir(path.parent) == ["a.png"]


def test_the_ending_names_the_format(tmp_path: Path) -> None:
    assert save_figure(Figure((1, 1)), tmp_path / "a.svg", dpi=20).read_text().startswith("<?xml")
    assert save_figure(Figure((1, 1)), tmp_path / "a", dpi=20).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"no picture can be written as \.foo: choose one of .*png"):
        save_figure(Figure((1, 1)), tmp_path / "a.foo", dpi=20)
