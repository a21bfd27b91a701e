"""The disk fails at each operation of a command in turn, by ENOSPC, EIO or a kill: nothing is lost, nothing misleads.

After each failure: the command ended with one clear line, no file that looks whole is anything else, and the same
command, run again, ends with the same content as one that nothing disturbed. So SQLite tests its own writes.
"""

import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import CheckpointError
from pipeline.files import PARTIAL
from pipeline.training.checkpoint import load_checkpoint
from pipeline.training.metrics import read_metrics
from stages.extract_teacher_features import run as extract
from tests import forked
from tests.failing_disk import KINDS, PROGRAM, PROGRAM_WITH_CHILDREN, failing
from tests.pictures import smooth_picture
from tests.test_stages.conftest import ENCODER, MICRO, extract_config
from tests.test_stages.test_ablate import write_config

ROOT = Path(__file__).parents[2]
SLICE = ("kill", "ENOSPC", "EIO", "kill")  # of a scenario in the fast suite, spread over its writes
# Differ from run to run.
_TIMES = (
    "made",
    "times",
    "digest",
    "images_per_s",
    "data_wait",
    "checkpoint_s",
    "evaluation_s",
    "memory_gib",
    "seconds",
)
# Appended row by row; a torn last row is dropped by the next start.
_GROWING = ("metrics.jsonl", "train.log", "starts.jsonl", "commands.log")
_TABLES = ("table.md", "table.csv", "bars.png")  # of an ablation: written again with each row


@dataclass(frozen=True)
class Scenario:
    """A command that writes `out`; the disk fails in all of the folder around it.

    Attributes:
        words: of the command line.
        before: puts into `out` what the command finds there.
        program: what the process runs.
    """

    words: list[str]
    out: Path
    before: Callable[[], None] = field(default=lambda: None)
    program: str = PROGRAM

    def start(self, at: int, how: str, log: Path | None = None) -> tuple[int, str]:
        """Exit code and errors of the command on a disk that fails at its `at`-th operation."""
        process = forked.run(
            [sys.executable, "-c", self.program, *self.words],
            env=failing(self.out.parent, at, how, log), cwd=self.out.parent, text=True,
        )  # fmt: skip
        _wait_for_orphans(self.out.parent)
        return process.returncode, process.stderr

    def reset(self) -> None:
        shutil.rmtree(self.out.parent, ignore_errors=True)
        self.out.parent.mkdir()
        self.before()


def _wait_for_orphans(folder: Path) -> None:
    """Until the commands that a killed `ablate` had started in `folder` have ended: they go on without it."""

    def at_work() -> list[int]:
        return [process.pid for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(folder)]

    deadline = time.monotonic() + 60
    while orphans := at_work():
        assert time.monotonic() < deadline, orphans
        time.sleep(0.1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve labelled images, a cache of them, a pre-trained student."""
    root = tmp_path_factory.mktemp("inputs")
    for number in range(12):
        folder = root / "images" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        picture = smooth_picture(number, 48 + number, 70)
        picture.save(folder / f"{number:02d}.png")
        labels = root / "labels" / folder.name / f"{number:02d}.png"
        labels.parent.mkdir(parents=True, exist_ok=True)
        picture.convert("L").point(lambda grey: grey // 86).save(labels)
    extract(extract_config(root / "images", root / "cache", views={"count": 1, "image_size": 64}, cache__max_nmse=1.0))
    student = Scenario(_pretrain(root, root / "student" / "run"), root / "student" / "run")
    student.reset()
    code, errors = student.start(0, "kill")
    assert code == 0, errors
    write_config(root, root / "images", seeds=[0])
    return root


def _mapping(values: dict[str, Any]) -> str:
    return json.dumps(values).replace('"', "")


def _pretrain(root: Path, out: Path) -> list[str]:
    return [
        "pretrain", f"output={out}", f"data={{path: {root / 'images'}, workers: 0}}", f"cache.path={root / 'cache'}",
        f"student={_mapping(MICRO)}", "optim={lr: 1e-3, warmup_epochs: 0}", "batch_size=6", "max_steps=4",
        "log_every=1", "checkpoint_every=2", "keep_checkpoints=1", "tensorboard=false",
    ]  # fmt: skip


def _scenario(name: str, root: Path, folder: Path) -> Scenario:
    out, images = folder / "disk" / "out", root / "images"
    sets = [f"data={{path: {images}, workers: 0}}", f"val={{path: {images}, workers: 0}}"]
    if name.startswith("extract"):
        store = name.partition(" ")[2]
        words = [
            "extract-teacher-features", f"data={{path: {images}, workers: 0}}",
            "teacher={spec: timm:test_vit, weights: random, image_size: 64}", "views={count: 1, image_size: 64}",
            f"cache={{path: {out}, store: {store}, samples_per_shard: 6, max_nmse: 1.0}}", "batch_size=16",
        ]  # fmt: skip
        return Scenario(words, out)
    if name == "repair":
        return Scenario(["verify-cache", str(out), "--repair"], out, lambda: _damage(root / "cache", out))
    if name == "pretrain":
        knn = f"knn={{every: 1, data: {{path: {images}, workers: 0}}, val: {{path: {images}, workers: 0}}}}"
        return Scenario([*_pretrain(root, out), knn], out)
    if name == "finetune":
        words = [
            "finetune", f"output={out}", *sets, f"student={_mapping(ENCODER)}", "image_size=64", "batch_size=6",
            "max_steps=4", "checkpoint_every=2", "log_every=1", "tensorboard=false", "ema.decay=0.9",
            "optim={lr: 1e-3, warmup_epochs: 0}",
        ]  # fmt: skip
        return Scenario(words, out)
    init = f"init={root / 'student' / 'run'}"
    scenes = f"{{images: {images}, labels: {root / 'labels'}}}"
    return {
        "knn": Scenario(["knn", init, *sets, f"output={out}"], out),
        "linear-probe": Scenario(
            ["linear-probe", init, *sets, f"output={out}", "epochs=1", "blrs=[0.1]", "batch_size=6"], out
        ),
        "codes": Scenario(["codes", f"cache.path={root / 'cache'}", f"output={out}", "clusters=8"], out),
        "segment": Scenario(
            [
                "segment",
                init,
                f"data={{train: {scenes}, val: {scenes}, workers: 0}}",
                "labels.num_classes=3",
                f"output={out}",
                "batch_size=4",
                "max_steps=4",
                "checkpoint_every=2",
                "log_every=1",
                "tensorboard=false",
            ],
            out,
        ),
        "embed": Scenario(["embed", init, sets[0], f"output={out / 'features.safetensors'}"], out),
        "export": Scenario(["export", init, f"output={out}"], out),
        "report": Scenario(["report", str(root / "student" / "run"), "--output", str(out / "report.html")], out),
        "visualize": Scenario(
            ["visualize", init, f"images=[{images / 'class0/00.png'}]", f"output={out / 'picture.png'}"], out
        ),
        "ablate": Scenario(
            ["ablate", "--config", str(root / "chain.yaml"), f"output={out}"], out, program=PROGRAM_WITH_CHILDREN
        ),
    }[name]


def _damage(cache: Path, out: Path) -> None:
    shutil.copytree(cache, out)
    file = max((out / "tokens").rglob("c*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


SCENARIOS = [
    "extract zarr", "extract webdataset", "repair", "codes", "pretrain", "finetune", "knn", "linear-probe", "export",
    "report", "visualize", "embed", "segment", "ablate",
]  # fmt: skip


def _whole(out: Path) -> dict[str, Any]:
    """What lies there under a final name: content without times."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() or path.is_symlink()]
    names = {path.relative_to(out).as_posix(): path for path in files}
    newest = max((name for name in names if name.startswith("checkpoints/step-")), default="")[:25]
    return {name: _content(path) for name, path in names.items() if _is_compared(name, newest)}


def _is_compared(name: str, newest: str) -> bool:
    """Not what is temporary or grows, nor an older checkpoint: one more of them may be left."""
    if any(part.startswith(".") and part.endswith((".partial", ".lock")) for part in name.split("/")):
        return False
    return not name.endswith(_GROWING) and not (name.startswith("checkpoints/step-") and not name.startswith(newest))


class _Features:
    """Kept features. Where a command computed other ones before, memory lies differently, and so may the last bits."""

    def __init__(self, path: Path) -> None:
        self.tensors = load_file(path)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Features)
            and self.tensors.keys() == other.tensors.keys()
            and all(torch.allclose(tensor, other.tensors[name]) for name, tensor in self.tensors.items())
        )


def _content(path: Path) -> Any:
    if path.parent.name == "features":
        return _Features(path)
    if path.is_symlink():
        return str(path.readlink())
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text()))
    if path.suffix == ".html":  # its curves hold the date
        return path.read_text().endswith("</html>\n")
    if path.name in ("table.md", "table.csv"):  # their last column is a time
        return [re.split("[|,]", line.rstrip("|"))[:-1] for line in path.read_text().splitlines()]
    return path.read_bytes()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(content) for key, content in value.items() if key not in _TIMES}
    return value


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def _rows(out: Path) -> list[tuple[int, float]]:
    """(step, loss) of the metrics of a run; none where there is no run."""
    file = out / "metrics.jsonl"
    rows = map(json.loads, file.read_text().splitlines()) if file.exists() else iter(())
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def _check_failure(code: int, errors: str, how: str) -> None:
    """A kill leaves nothing to say. Else one line names the disk; where a failure costs nothing, there is none."""
    if how == "kill":
        assert code == -signal.SIGKILL
    elif code:
        assert code == 2, errors
        assert not {"Traceback", "unexpected"} & set(errors.split()), errors
        last = errors.strip().splitlines()[-1]
        assert last.startswith("error: "), errors
        signs = ("disk is full", "No space left", "free some") if how == "ENOSPC" else ("Input/output error", "I/O")
        assert any(sign in last for sign in signs), last


def _check_whole(out: Path, expected: dict[str, Any]) -> None:
    """No file or folder under its final name is anything but what the undisturbed command wrote."""
    for path in (out / "checkpoints").glob("[!.]*"):
        load_checkpoint(path)  # every byte of it, against its record
    for name, content in _whole(out).items():
        assert name in expected or name.startswith("checkpoints/") or name == "run.lock", name
        if name.endswith("done.json"):  # grows by a step at a time
            content.pop("attempts", None)  # seconds of what failed
            assert content.items() <= expected[name].items(), name
        elif name in expected and not name.startswith("checkpoints/best") and name not in _TABLES:
            assert content == expected[name], name


Operations = list[tuple[str, str]]


def _sweep(
    scenario: Scenario, name: str, log: Path, chosen: Callable[[Operations], Iterator[tuple[int, str]]]
) -> tuple[int, int, list[str]]:
    """Operations of the command, failures injected, and a line for each wrong end."""
    scenario.reset()
    code, errors = scenario.start(0, "kill", log)
    assert code == 0, errors
    operations, expected, rows = json.loads(log.read_text()), _whole(scenario.out), _rows(scenario.out)
    assert expected, "the command writes nothing here"
    count, wrong = 0, list[str]()
    for at, how in chosen(operations):
        scenario.reset()
        code, errors = scenario.start(at, how)
        try:
            _check_failure(code, errors, how)
            missing = _differences(_whole(scenario.out), expected) if code == 0 else []
            assert [file for file in missing if not file.startswith("features/")] == []  # those are kept if they can be
            if name != "repair":
                _check_whole(scenario.out, expected)
            again, errors = scenario.start(0, "kill")
            if name == "export" and code == 0:
                assert "is there already" in errors
            else:
                assert again == 0, errors
            assert _differences(_whole(scenario.out), expected) == []
            assert _rows(scenario.out) == rows
            assert [path.name for path in scenario.out.rglob(f".*{PARTIAL}")] == []
            for lines in scenario.out.rglob("*.jsonl"):
                read_metrics(lines)
        except (AssertionError, CheckpointError, ValueError) as error:
            wrong.append(f"{how} at operation {at} of {len(operations)}, {operations[at - 1]}: {error}")
        count += 1
    return len(operations), count, wrong


@pytest.mark.parametrize("name", ["extract webdataset", "pretrain", "visualize"])  # the slow sweep has all
def test_a_failing_operation_of_the_disk_costs_nothing(name: str, inputs: Path, tmp_path: Path) -> None:

    def spread(operations: Operations) -> Iterator[tuple[int, str]]:
        places = [at for at, (kind, _) in enumerate(operations, 1) if kind in ("write", "replace", "fsync")]
        for number, how in enumerate(SLICE):
            yield places[number * (len(places) - 1) // (len(SLICE) - 1)], how

    _, failures, wrong = _sweep(_scenario(name, inputs, tmp_path), name, tmp_path / "log.json", spread)
    assert failures == len(SLICE)
    assert wrong == []


@pytest.mark.slow  # two runs of the command for each operation
@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_no_failing_operation_of_the_disk_costs_anything(
    name: str, how: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def every(operations: Operations) -> Iterator[tuple[int, str]]:
        yield from ((at, how) for at in range(1, len(operations) + 1))

    operations, failures, wrong = _sweep(_scenario(name, inputs, tmp_path), name, tmp_path / "log.json", every)
    with capsys.disabled():  # the figures of docs/reliability.md
        sys.stderr.write(f"{name}, {how}: {operations} operations, {failures} failures, {len(wrong)} wrong ends\n")
    assert wrong == []
