"""The one reader of foreign weights: what a file is is said by its bytes, nothing in it is run, one digest."""

import argparse
import errno
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.weights import WRAPPERS, load_tensors, read_state, state_digest

STATE = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}


class Spring:
    """A pickle that runs code when it is opened carelessly."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("sprung"),))


def written(folder: Path, value: Any, name: str = "weights.pth") -> Path:
    torch.save(value, folder / name)
    return folder / name


@pytest.mark.parametrize("name", ["a.pth", "pytorch_model.bin", "model_best.pth.tar", "last.ckpt", "no_ending"])
def test_no_ending_matters(name: str, tmp_path: Path) -> None:
    assert state_digest(read_state(written(tmp_path, STATE, name))) == state_digest(STATE)
    save_file(STATE, tmp_path / name)
    assert state_digest(read_state(tmp_path / name)) == state_digest(STATE)


def test_torch_files_of_old_read_too(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert state_digest(read_state(tmp_path / "old.pth")) == state_digest(STATE)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "backbone.", "module.backbone."])
def test_wrappers_and_prefixes(wrapper: str, prefix: str, tmp_path: Path) -> None:
    state = {f"{prefix}{key}": value for key, value in STATE.items()}
    file = written(tmp_path, {wrapper: state, "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}}})
    assert state_digest(read_state(file)) == state_digest(STATE)


def test_beside_a_backbone_heads_are_left_away(tmp_path: Path) -> None:
    state = {f"backbone.{key}": value for key, value in STATE.items()} | {"dino_head.mlp.0.weight": torch.zeros(4)}
    assert read_state(written(tmp_path, {"teacher": state})).keys() == STATE.keys()


def test_our_own_names_stay_as_they_are(tmp_path: Path) -> None:
    """A detector keeps its encoder in `backbone`."""
    save_file({"backbone.weight": torch.ones(1), "head": torch.ones(1)}, tmp_path / "model.safetensors")
    assert load_tensors(tmp_path / "model.safetensors").keys() == {"backbone.weight", "head"}


def test_of_two_sets_of_weights_it_is_said_which_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = {key: value + 1 for key, value in STATE.items()}
    file = written(tmp_path, {"student": other, "teacher": STATE})
    assert state_digest(read_state(file)) == state_digest(STATE)
    assert "taking the weights of 'teacher'; it also holds those of student" in caplog.text


def test_arguments_and_numbers_of_numpy_are_harmless(tmp_path: Path) -> None:
    beside = {"args": argparse.Namespace(lr=np.float32(0.1)), "best": np.float64(0.8), "rng": np.arange(3)}
    assert read_state(written(tmp_path, {"model": STATE, **beside})).keys() == STATE.keys()


def test_code_never_runs_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": STATE, "args": Spring()}, "trap.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Spring(), protocol=2))
    for name in ("trap.pth", "plain.pth"):
        with pytest.raises(CheckpointError, match=r"holds more than tensors and is refused, for opening .*getattr"):
            read_state(Path(name))
    objects = np.array([Spring()], dtype=object)
    with pytest.raises(CheckpointError):
        read_state(written(tmp_path, {"model": STATE, "objects": objects}, "objects.pth"))
    assert not Path("sprung").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 22\n", "git-lfs pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html>404</html>", "is a web page.*download"),
        (b'{"weight_map": {}}', "is JSON text.*beside it"),
        (b"\x1f\x8b\x08\x00", "gzip archive.*unpack"),
        (b"", "is empty: fetch it again"),
        (b"not weights", "is torn.*fetch it again"),
    ],
)
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_what_is_no_weights_is_named(content: bytes, message: str, ending: str, tmp_path: Path) -> None:
    (tmp_path / f"file{ending}").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_state(tmp_path / f"file{ending}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("member", "message"), [("a/constants.pkl", "TorchScript program"), ("a.npy", "zip archive")])
def test_archives_are_named(member: str, message: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr(member, b"")
    with pytest.raises(CheckpointError, match=message):
        read_state(tmp_path / "a.pt")


def test_other_contents_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent.pth: no such file"):
        read_state(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_state(tmp_path)
    with pytest.raises(CheckpointError, match="but 'epoch', 'args': save the weights alone"):
        read_state(written(tmp_path, {"epoch": 1, "args": {}}))
    with pytest.raises(CheckpointError, match="but a list"):
        read_state(written(tmp_path, [1, 2]))
    for name in ("torn.pth", "torn.safetensors"):
        save_file(STATE, tmp_path / name) if "safe" in name else torch.save(STATE, tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-5])
        with pytest.raises(
            CheckpointError, match=r"is torn: it ends early, or bytes in it are damaged; fetch it again$"
        ):
            read_state(tmp_path / name)


def test_a_disk_that_fails_is_not_a_torn_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object, **options: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = written(tmp_path, STATE)
    monkeypatch.setattr(torch, "load", failing)
    with pytest.raises(CheckpointError, match=r"weights.pth can't be read \(Input/output error\): check the disk"):
        read_state(file)


def test_the_digest_sees_names_shapes_types_and_bytes() -> None:
    others: list[dict[str, Tensor]] = [
        {"weight": STATE["weight"].view(3, 2), "bias": STATE["bias"]},
        {"weight": STATE["weight"] + 1e-6, "bias": STATE["bias"]},
        {"weight": STATE["weight"].double(), "bias": STATE["bias"]},
        {"weigth": STATE["weight"], "bias": STATE["bias"]},
    ]
    assert len({state_digest(state) for state in [STATE, *others]}) == 5
    assert state_digest({"bias": STATE["bias"], "weight": STATE["weight"]}) == state_digest(STATE)
    transposed = torch.arange(6.0).view(3, 2).T
    assert state_digest({"weight": transposed}) == state_digest({"weight": transposed.contiguous()})
