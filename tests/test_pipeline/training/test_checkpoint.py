import errno
import logging
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from pipeline.errors import CheckpointError
from pipeline.training.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    prune,
    resolve_checkpoint,
    save_checkpoint,
)


def save(folder: Path, step: int) -> Path:
    torch.manual_seed(step)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    path = folder / f"step-{step:08d}"
    save_checkpoint(
        path,
        model,
        {"kind": "test"},
        step=step,
        identity={"seed": 1},
        metrics={"loss": 0.5},
        optimizer_state=optimizer.state_dict(),
    )
    return path


def test_round_trip(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(save(tmp_path, 7))
    assert (checkpoint.step, checkpoint.identity, checkpoint.metrics) == (7, {"seed": 1}, {"loss": 0.5})
    assert checkpoint.optimizer_state()["state"][0]["exp_avg"].shape == (2, 3)


@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "optimizer.pt", "checkpoint.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_a_torn_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content if how == "flip" else content[: len(content) // 2])
    if how == "gone":
        file.unlink()
    with caplog.at_level(logging.WARNING):
        newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 1
    assert "skipped" in caplog.text


@pytest.mark.parametrize(
    ("writer", "error"),
    [
        ("torch.save", OSError(errno.ENOSPC, "No space left on device")),
        ("pipeline.training.checkpoint.save_file", SafetensorError("I/O error: No space left on device")),
    ],
)
def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, error: Exception
) -> None:
    before = save(tmp_path, 1)

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(writer, full)
    with pytest.raises(CheckpointError, match="No space left"):
        save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [before]


def test_saving_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert load_checkpoint(save(tmp_path, 1)).step == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_prune_keeps_the_newest_and_clears_leftovers(tmp_path: Path) -> None:
    for step in range(1, 5):
        save(tmp_path, step)
    (tmp_path / ".step-00000009.partial").mkdir()
    prune(tmp_path, keep=2, newest="step-00000004")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_init_may_name_a_run_a_checkpoint_or_a_file(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 3)
    assert resolve_checkpoint(tmp_path) == path
    assert resolve_checkpoint(path) == path
    assert resolve_checkpoint(path / "model.safetensors") == path / "model.safetensors"
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        resolve_checkpoint(path.parent)


def test_prune_never_takes_the_sound_one_for_a_torn_later_one(tmp_path: Path) -> None:
    (save(tmp_path, 9) / "model.safetensors").unlink()
    sound = save(tmp_path, 5)
    prune(tmp_path, keep=1, newest=sound.name)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 5
