import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from pipeline.configs.training import EmaConfig
from pipeline.errors import CheckpointError, StorageError
from pipeline.training.checkpoint import (
    Checkpoint,
    best_checkpoint,
    load_checkpoint,
    make_best,
    newest_checkpoint,
    prune,
    resolve_checkpoint,
    retire_best,
    save_checkpoint,
)


def save(folder: Path, step: int, name: str = "step") -> Path:
    torch.manual_seed(step)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    path = folder / f"{name}-{step:08d}"
    checkpoint = Checkpoint(path, step, identity={"seed": 1}, metrics={"loss": 0.5}, meter={"count": 3})
    save_checkpoint(checkpoint, model.state_dict(), {"kind": "test"}, EmaConfig(decay=0.5), optimizer.state_dict())
    return path


def test_round_trip(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(save(tmp_path, 7))
    assert (checkpoint.step, checkpoint.identity, checkpoint.metrics) == (7, {"seed": 1}, {"loss": 0.5})
    assert checkpoint.meter == {"count": 3}
    assert checkpoint.optimizer_state()["state"][0]["exp_avg"].shape == (2, 3)
    assert "decay: 0.5" in (checkpoint.path / "config.yaml").read_text()


@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "config.yaml", "optimizer.pt", "checkpoint.json"])
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
        ("pipeline.tensor_files.save_file", SafetensorError("I/O error: No space left on device")),
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


def test_saving_again_leaves_a_sound_one_and_replaces_a_torn_one(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    inode = path.stat().st_ino
    assert save(tmp_path, 1).stat().st_ino == inode
    (path / "model.safetensors").write_bytes(b"torn")
    assert load_checkpoint(save(tmp_path, 1)).step == 1
    assert list(tmp_path.iterdir()) == [path]


def test_the_best_is_a_link_that_moves_on(tmp_path: Path) -> None:
    assert best_checkpoint(tmp_path) is None
    for step in (3, 7):
        make_best(save(tmp_path, step, "best"))
    best = best_checkpoint(tmp_path)
    assert best is not None
    assert best.step == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "best-00000007"]


def test_a_damaged_best_counts_for_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_best(save(tmp_path, 3, "best"))
    (tmp_path / "best/model.safetensors").write_bytes(b"torn")
    assert best_checkpoint(tmp_path) is None
    assert "chosen anew" in caplog.text
    shutil.rmtree(tmp_path / "best-00000003")
    assert best_checkpoint(tmp_path) is None  # a link to nowhere


def test_a_best_folder_of_old_gives_way_to_the_link(tmp_path: Path) -> None:
    save(tmp_path, 3).rename(tmp_path / "best")
    former = best_checkpoint(tmp_path)
    assert former is not None
    assert former.step == 3
    make_best(save(tmp_path, 7, "best"))
    best = best_checkpoint(tmp_path)
    assert best is not None
    assert best.step == 7


class Killed(BaseException):
    """Like SIGKILL, nothing in the program handles it."""


CHANGES = ("mkdir", "rename", "replace", "symlink", "unlink", "rmdir", "fsync")  # calls of os that change a folder


def killed_at(call: int, work: Callable[[], object]) -> bool:
    """Do the work until its so many-th change on the disk; whether it came that far."""
    calls = 0

    def counting(change: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= call:  # and none after it: the process is gone
                raise Killed
            return change(*args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, counting(getattr(os, name)))
        try:
            work()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("torn", [False, True], ids=["beside nothing", "beside a torn one"])
def test_no_kill_loses_the_last_sound_checkpoint(tmp_path: Path, torn: bool) -> None:
    """With one to keep: killed at any change on the disk there is a sound one, and the next attempt succeeds."""

    def saved_and_pruned() -> None:
        prune(folder, keep=1, newest=save(folder, 2).name)

    reached = set()
    for call in range(1, 200):
        folder = tmp_path / str(call)
        save(folder, 1)
        if torn:
            (save(folder, 2) / "checkpoint.json").write_text("{}")
        was_killed = killed_at(call, saved_and_pruned)
        newest = newest_checkpoint(folder)
        assert newest is not None
        reached.add(newest.step)
        saved_and_pruned()
        assert [path.name for path in folder.iterdir()] == ["step-00000002"]
        if not was_killed:
            break
    assert not was_killed
    assert call > 10
    assert reached == {1, 2}


def test_no_kill_loses_the_best(tmp_path: Path) -> None:
    def better() -> None:
        make_best(save(folder, 2, "best"))

    reached = set()
    for call in range(1, 200):
        folder = tmp_path / str(call)
        make_best(save(folder, 1, "best"))
        was_killed = killed_at(call, better)
        best = best_checkpoint(folder)
        assert best is not None
        reached.add(best.step)
        better()
        assert sorted(path.name for path in folder.iterdir()) == ["best", "best-00000002"]
        if not was_killed:
            break
    assert not was_killed
    assert call > 10
    assert reached == {1, 2}


def test_prune_keeps_the_newest_and_clears_leftovers(tmp_path: Path) -> None:
    for step in range(1, 5):
        save(tmp_path, step)
    (tmp_path / ".step-00000009.partial").mkdir()
    prune(tmp_path, keep=2, newest="step-00000004")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_copy_that_the_user_keeps_is_neither_the_newest_nor_pruned(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        save(folder, step)
    kept = folder / "step-00000002-keep"
    shutil.copytree(folder / "step-00000002", kept)
    save(folder, 3)
    prune(folder, keep=1, newest="step-00000003")
    assert sorted(path.name for path in folder.iterdir()) == [kept.name, "step-00000003"]
    shutil.rmtree(folder / "step-00000003")
    assert newest_checkpoint(folder) is None
    assert resolve_checkpoint(kept) == kept


def test_a_disk_without_symbolic_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path, _target: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(CheckpointError, match="this file system has no symbolic links; choose an output on one"):
        make_best(save(tmp_path, 1, "best"))


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


def test_a_disk_that_does_not_answer_is_no_torn_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    open_file = Path.open

    def stale(path: Path, *how: Any, **keys: Any) -> Any:
        if path.parent == newest and path.name == "model.safetensors":
            raise OSError(errno.ESTALE, "Stale file handle")
        return open_file(path, *how, **keys)

    monkeypatch.setattr(Path, "open", stale)
    with pytest.raises(StorageError, match=r"step-00000002 can't be read \(Stale file handle\).*move it away"):
        newest_checkpoint(tmp_path)


def test_a_damaged_checkpoint_is_no_init(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what was written"):
        resolve_checkpoint(path)


def test_a_best_of_steps_to_come_gives_up_its_name_but_stays(tmp_path: Path) -> None:
    make_best(save(tmp_path, 7, "best"))
    for _ in range(2):
        best = best_checkpoint(tmp_path)
        assert best is not None
        assert best.step == 7
        retire_best(best)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "best-00000007-former"]
    make_best(save(tmp_path, 7, "best"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "best-00000007"]
