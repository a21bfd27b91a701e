"""--plugin: an objective, a teacher and a student of a user's own file, through the command in a process of its own."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pipeline.plugins
from pipeline.assembly.chains.chain import Chain
from pipeline.cache import open_cache
from tests import forked
from tests.test_stages.conftest import MICRO

MINE = '''
import timm
import torch

from pipeline.models import OBJECTIVES, Objective
from pipeline.teachers import TEACHERS, ModuleEntry, TeacherOutput


class Relations(torch.nn.Module):
    """Tokens are to be as near to each other as the teacher's are."""

    def __init__(self, dim, width):
        super().__init__()
        self.head = torch.nn.Linear(dim, width)

    def forward(self, tokens, targets):
        student = torch.nn.functional.normalize(self.head(tokens[-1]), dim=-1)
        teacher = torch.nn.functional.normalize(targets, dim=-1)
        return (student @ student.mT - teacher @ teacher.mT).square().mean((1, 2))


class Colours(torch.nn.Module):
    """A token is its patch at 4x4 pixels; the brightest patches are looked at."""

    def forward(self, pixels):
        small = torch.nn.functional.adaptive_avg_pool2d(pixels, 16)
        tokens = torch.nn.functional.unfold(small, 4, stride=4).mT
        return TeacherOutput(tokens, tokens.mean(-1).softmax(-1))


OBJECTIVES["relations"] = Objective(pixels=False, mimics="encoder", loss=Relations)
OBJECTIVES["relations_of_maps"] = Objective(pixels=False, mimics="map", loss=Relations)
TEACHERS["colours"] = ModuleEntry(lambda weights: Colours(), version="1", image_size=64, grid=(4, 4), about="small")


@timm.models.register_model
def mine_resnet(pretrained=False, **options):
    return timm.create_model("test_resnet", **options)
'''
STUDENT = [f"student.{key}={value}" for key, value in MICRO.items()]
TRAINED = ["data.workers=1", "tensorboard=false", "batch_size=8", "max_steps=3", "checkpoint_every=1", "log_every=1"]
VIEWS = ["data.workers=1", "views.image_size=64", "cache.samples_per_shard=8", "cache.max_nmse=1"]


def mrmae(folder: Path, *words: Any) -> tuple[int, str]:
    done = forked.run([*forked.CLI, *map(str, words)], cwd=folder, text=True)
    return done.returncode, done.stdout + done.stderr


def well(folder: Path, *words: Any) -> str:
    code, output = mrmae(folder, *words)
    assert code == 0, output
    return output


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, image_tree: Path) -> Path:
    """A user's folder, outside the clone: their code, and a cache of their own teacher."""
    home = tmp_path_factory.mktemp("home")
    (home / "mine.py").write_text(MINE)
    extract = ["extract-teacher-features", f"data.path={image_tree}", "teacher.spec=colours", *VIEWS]
    well(home, "--plugin", "mine.py", *extract, "cache.path=cache")
    return home


def pretraining(images: Path, output: str, *keys: str) -> list[str]:
    where = [f"data.path={images}", "cache.path=cache", f"output={output}"]
    return ["pretrain", "--plugin", "mine.py", *where, *TRAINED, *keys]


def rows(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if "mimic_loss" in row]


def test_a_teachers_cache_holds_what_it_gives_and_says_whose_it_is(home: Path, image_tree: Path) -> None:
    cache = open_cache(home / "cache")
    teacher = cache.header.teacher
    assert (teacher["spec"], teacher["grid"], teacher["dim"]) == ("colours", [4, 4], 48)
    assert teacher["libraries"] == {"torch": str(torch.__version__), "mine.Colours": "1"}
    record = cache.read(0, view=0, dequantise=True)
    expected = torch.from_numpy(record.tokens).mean(-1).softmax(-1)  # what Colours looks at
    torch.testing.assert_close(torch.from_numpy(record.attention).float(), expected, atol=5e-3, rtol=0)
    deep = ["verify-cache", "cache", "--level", "deep"]
    well(home, "--plugin", "mine.py", *deep)
    code, output = mrmae(home, *deep)
    assert code == 2, output
    assert "unknown teacher 'colours'" in output


def test_another_version_of_a_teacher_is_another_cache(home: Path, image_tree: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE.replace('version="1"', 'version="2"'))
    extract = ["extract-teacher-features", f"data.path={image_tree}", "teacher.spec=colours", *VIEWS]
    code, output = mrmae(home, "--plugin", tmp_path / "mine.py", *extract, "cache.path=cache")
    assert code == 2, output
    assert "teacher.libraries.mine.Colours is 1 there, 2 here" in output


def test_an_objective_trains_three_steps_and_goes_on(home: Path, image_tree: Path) -> None:
    command = pretraining(image_tree, "runs/relations", "mimic.objective=relations", *STUDENT)
    output, run = well(home, *command), home / "runs/relations"
    assert f"mrmae --plugin {home / 'mine.py'} knn" in output  # what may follow is told with the plug-in
    assert [row["step"] for row in rows(run)] == [1, 2, 3]
    last = run / "checkpoints/step-00000003"
    trained = load_file(last / "model.safetensors")
    assert trained["mimic.colours.head.weight"].shape == (48, 48)
    before = load_file(run / "checkpoints/step-00000002/model.safetensors")
    assert not torch.equal(trained["mimic.colours.head.weight"], before["mimic.colours.head.weight"])
    shutil.rmtree(last)  # as after a kill before it was written
    assert "resumed from" in well(home, *command)
    again = load_file(last / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in trained.items())
    shutil.rmtree(last)
    code = (home / "mine.py").read_text()
    (home / "mine.py").write_text(f"{code}# changed\n")
    output = well(home, *command)
    (home / "mine.py").write_text(code)
    assert re.search(r"plugins was \{'mine.py': '\w{16}'\} when the run stopped and is .* now", output)


def test_what_it_trained_is_measured_with_it_and_refused_without(home: Path, image_tree: Path) -> None:
    well(home, *pretraining(image_tree, "runs/measured", "mimic.objective=relations", *STUDENT))
    knn = ["knn", "init=runs/measured", f"data.path={image_tree}", "val.share=0.5", "output=runs/measured", "k=3"]
    assert "top1" in well(home, "--plugin", "./mine.py", *knn)
    code, output = mrmae(home, *knn)
    assert code == 2, output
    assert (
        "objective='relations' is unknown: load the file that registers it by --plugin FILE.py (there are mr_mae,"
        in output
    )


def test_a_students_network_and_whole_maps(home: Path, image_tree: Path) -> None:
    keys = ["mimic.objective=relations_of_maps", "student.name=timm:mine_resnet", "mimic.resize_targets=bilinear"]
    well(home, *pretraining(image_tree, "runs/maps", *keys))
    assert rows(home / "runs/maps")[-1]["mimic_loss"] > 0


@pytest.mark.usefixtures("forked_commands")
def test_ablate_and_bootstrap_hand_it_on(home: Path, image_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of their commands is a step of a chain."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(pipeline.plugins, "_loaded", {str(home / "mine.py"): ""})
    data, views = {"path": str(image_tree), "workers": 0}, {"image_size": 64}
    extraction = {"data": data, "teacher": "colours", "views": views, "cache": {"path": "chain", "max_nmse": 1.0}}
    (home / "chain.yaml").write_text(json.dumps({"extract-teacher-features": extraction}))
    chain = Chain(home / "chain.yaml")
    with chain:
        chain.run("extract-teacher-features", [], home / "chained", "theirs")
    assert open_cache(home / "chain").header.teacher["name"] == "colours"
    log = (home / "chained/commands.log").read_text()
    assert log.startswith(f"$ mrmae --plugin {home / 'mine.py'} extract-teacher-features --config {home}/chain.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plugin", "absent.py"], "--plugin absent.py: no such file"),
        (
            ["--plugin", "other"],
            "--plugin other: no such module is installed; give a file by its path, as in ./other.py",
        ),
        (["--plugin", "broken.py"], "--plugin broken.py can't be loaded: ZeroDivisionError, line 3: division by zero"),
        (["--plugin", "halves.py"], "--plugin halves.py can't be loaded: SyntaxError, line 1"),
        (["--plugin", "json.py"], "there is another module 'json': rename the file"),
        (["--plugin", "my-code.py"], "my-code is no name of a module"),
        (["mimic.objective=relation"], "mimic.objective: objective='relation' is unknown: did you mean 'relations'"),
        (["teacher.spec=colour"], "unknown teacher 'colour': did you mean 'colours'?"),
    ],
)
def test_what_is_wrong_is_one_line(home: Path, image_tree: Path, words: list[str], message: str) -> None:
    (home / "broken.py").write_text("def half():\n    return 1\nx = 1 / 0\n")
    (home / "halves.py").write_text("def\n")
    (home / "json.py").write_text("")
    (home / "my-code.py").write_text("")
    command = ["pretrain", f"data.path={image_tree}", "output=runs/wrong", *words]
    code, output = mrmae(home, "--plugin", "mine.py", *command)
    assert code == 2, output
    assert message in output
    assert len(output.splitlines()) == 1
    assert not (home / "runs/wrong").exists()


def test_no_file_of_the_folder_runs_by_itself(home: Path, image_tree: Path, tmp_path: Path) -> None:
    """Neither a config nor the names that it holds load code."""
    (tmp_path / "colours.py").write_text("open('ran', 'w')\n")
    (tmp_path / "chain.yaml").write_text("teacher: colours\nplugins: [colours.py]\n")
    code, output = mrmae(tmp_path, "extract-teacher-features", "--config", "chain.yaml", f"data.path={image_tree}")
    assert code == 2, output
    assert "unknown key 'plugins'" in output
    code, output = mrmae(tmp_path, "extract-teacher-features", "teacher=colours", f"data.path={image_tree}", "cache=c")
    assert "unknown teacher 'colours'" in output
    assert not (tmp_path / "ran").exists()
