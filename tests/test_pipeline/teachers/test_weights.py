"""Files of weights: read safely, loaded strictly, refused in one line."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import TeacherError
from pipeline.teachers.weights import load_strictly
from pipeline.weights import read_state, state_digest

STATE = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}


class Spring:
    """A pickle that runs code when it is opened carelessly."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("sprung"),))


def test_formats_and_wrappers_read_alike(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors")
    torch.save(STATE, tmp_path / "a.pth")
    torch.save({"epoch": 3, "model": {f"module.{key}": value for key, value in STATE.items()}}, tmp_path / "b.pth")
    digests = {state_digest(read_state(tmp_path / name)) for name in ("a.safetensors", "a.pth", "b.pth")}
    assert digests == {state_digest(STATE)}


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


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"teacher.weights=.*absent.pth: no such file"):
        read_state(tmp_path / "absent.pth")
    save_file(STATE, tmp_path / "torn.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "torn.safetensors").read_bytes()[:-5])
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "empty.pth").touch()
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("torn.safetensors", "text.pth", "empty.pth", "list.pth"):
        with pytest.raises(TeacherError, match=name) as caught:
            read_state(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert "safetensors" in str(caught.value)


def test_pickled_code_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Spring()}, "trap.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Spring(), protocol=2))
    for name in ("trap.pth", "plain.pth"):
        with pytest.raises(TeacherError, match="no file of plain tensors"):
            read_state(Path(name))
    assert not Path("sprung").exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": STATE["weight"]}, r"it lacks 1 tensor \(bias\)$"),
        ({**STATE, **{f"x{i}": torch.ones(1) for i in range(5)}}, r"it has unknown 5 tensors \(x0, x1, x2, ...\)$"),
        ({**STATE, "bias": torch.ones(7)}, r"bias is \[7\] where \[2\] is expected$"),
        ({"other": torch.ones(1)}, r"it lacks 2 tensors \(bias, weight\); has unknown 1 tensor \(other\)$"),
    ],
)
def test_weights_that_do_not_fit(state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(TeacherError, match=f"teacher.weights=file doesn't fit the model: .*{message}"):
        load_strictly(nn.Linear(3, 2), state, "file")
