"""The demo, whole but short: every part of it runs, and leaves what it promises."""

import json
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.utils import Bunch

from stages import demo


def test_the_demo_leaves_a_table_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = load_digits()
    few = Bunch(images=digits.images[:100], target=digits.target[:100])  # 10 or so of each digit
    monkeypatch.setattr(demo, "load_digits", lambda: few)
    said: list[str] = []
    config = demo.DemoConfig(output=tmp_path, max_steps=4, teacher_steps=4, finetune_steps=2)
    text = demo.run(config, say=said.append)
    table = json.loads((tmp_path / "results.json").read_text())
    assert list(table) == ["untrained", "mae", "mr_mae", "teacher (saw labels)", "raw pixels"]
    assert all(0 <= value <= 1 for row in table.values() for value in row.values())
    assert (tmp_path / "results.md").read_text() in text
    assert "the cache is sound" in "\n".join(said)
    for name in ("curves", "reconstructions", "attention"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 200
