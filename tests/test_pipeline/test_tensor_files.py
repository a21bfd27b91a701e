"""Weights on disk: whole or not at all, and with the mode of any other file."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from pipeline.evaluation.features import FeatureFiles
from pipeline.models import build_student, save_weights
from pipeline.tensor_files import save_tensors
from pipeline.training.checkpoint import Checkpoint, save_checkpoint
from stages import export
from tests.test_stages.conftest import MICRO


@pytest.fixture(params=[0o022, 0o002, 0o077])
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    """Of a new file under this umask."""
    former = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(former)


def modes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mode & 0o777 for file in folder.rglob("*") if file.is_file()}


def test_all_files_of_runs_and_exports_have_the_mode_that_the_umask_gives(tmp_path: Path, mode: int) -> None:
    for name in ("mrmae_vit_tiny_patch16", "mrmae_convvit_base_patch16"):
        (tmp_path / name).mkdir()
        save_weights(build_student(**{**MICRO, "name": name}, objective="mae"), tmp_path / name)
        export.run(export.ExportConfig(init=tmp_path / name, output=tmp_path / f"exported-{name}"))
    model, checkpoint = nn.Linear(2, 2), Checkpoint(tmp_path / "step-1", 1, identity={}, metrics={})
    optimizer_state = torch.optim.AdamW(model.parameters()).state_dict()
    save_checkpoint(checkpoint, model.state_dict(), {}, None, optimizer_state, model.state_dict())
    FeatureFiles(tmp_path, {}).write(torch.ones(2, 2), "0")
    found = modes(tmp_path)
    assert {"model.safetensors", "trained.safetensors", "optimizer.pt", "config.json"} <= found.keys()
    assert set(found.values()) == {mode}, found


def test_what_can_not_be_written_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    save_tensors({"a": torch.ones(2, 3).t()}, file, {"b": "c"})

    def full(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("no space left")

    monkeypatch.setattr("pipeline.tensor_files.save_file", full)
    with pytest.raises(SafetensorError):
        save_tensors({"a": torch.zeros(1)}, file)
    assert torch.equal(load_file(file)["a"], torch.ones(3, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
