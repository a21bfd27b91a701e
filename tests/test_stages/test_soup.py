"""finetune --eval combine=uniform and greedy: means of the weights of several fine-tunings."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.assembly.soups import average, choose_greedily
from pipeline.config import load_config
from pipeline.configs.data import DataConfig, ValConfig
from pipeline.data.labelled import LabelledDataset, open_splits
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.evaluation.metrics import topk_accuracy
from pipeline.evaluation.records import read_records
from pipeline.models import Classifier, build_classifier, build_student, load_model, load_weights, save_weights
from pipeline.pixels import normalise
from pipeline.training.checkpoint import load_checkpoint, resolve_checkpoint, save_checkpoint
from stages import export, finetune, predict
from stages.configs.export import ExportConfig
from stages.finetune import EvaluateConfig
from stages.predict import PredictConfig
from tests.test_stages.conftest import ENCODER, MICRO, finetune_config, sets

CNN = {"name": "timm:test_resnet", "image_size": 64}
SHARE = {"share": 0.34, "workers": 0}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return begun(tmp_path_factory.mktemp("start"), 0)


def begun(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    folder.mkdir(exist_ok=True)
    save_weights(build_student(**MICRO, objective="mae"), folder)
    return folder


@pytest.fixture(scope="module")
def runs(colours: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Fine-tunings of one start, which hold the same third of the images back. The third says the first's contrary."""
    root = tmp_path_factory.mktemp("runs")
    for number in range(2):
        keys: dict[str, Any] = {"init": str(start), "val": SHARE, "seed": number, "max_steps": 6}
        finetune.run(finetune_config(colours, root / str(number), **keys))
    run = load_checkpoint(resolve_checkpoint(root / "0"))
    contrary = {name: value * -3 if name.startswith("head") else value for name, value in weights(root / "0").items()}
    record = json.loads((run.path / "model.json").read_text())
    save_checkpoint(replace(run, path=root / "contrary"), contrary, record)
    return [root / "0", root / "1", root / "contrary"]


def soup(colours: Path, inits: Sequence[Path], output: Path, **changes: Any) -> dict[str, Any]:
    keys = {"init": [str(path) for path in inits], "combine": "uniform", "output": str(output)}
    return finetune.evaluate(EvaluateConfig.model_validate({**keys, "val": sets(colours)["val"], **changes}))


def greedy(colours: Path, inits: Sequence[Path], output: Path, **changes: Any) -> dict[str, Any]:
    keys = {"combine": "greedy", "data": sets(colours)["data"], "val": SHARE, "test": sets(colours)["val"]}
    return soup(colours, inits, output, **{**keys, **changes})


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(resolve_checkpoint(path) / "model.safetensors")


@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_mean_of_equal_weights_is_these_bits(count: int) -> None:
    state = {"weight": torch.randn(1000), "half": torch.randn(100).bfloat16(), "count": torch.tensor(5)}
    mean = average([state] * count)
    assert all(torch.equal(mean[name], state[name]) and mean[name].dtype == state[name].dtype for name in state)


def test_greedy_adds_what_does_not_lower_the_accuracy() -> None:
    """Best first: 1 (0.80), then 3 (0.75) lowers it, 0 (0.70) keeps it, 2 (0.60) raises it."""
    soups = {(1, 3): 0.79, (1, 0): 0.80, (1, 0, 2): 0.85}
    assert choose_greedily([0.70, 0.80, 0.60, 0.75], lambda numbers: soups[tuple(numbers)]) == ([1, 0, 2], 0.85)
    assert choose_greedily([0.5, 0.5], lambda numbers: {(0, 1): 0.4}[tuple(numbers)]) == ([0], 0.5)


def test_a_uniform_soup_of_two_equal_runs_is_that_run(colours: Path, runs: list[Path], tmp_path: Path) -> None:
    twin = Path(shutil.copytree(runs[0], tmp_path / "twin"))
    found = soup(colours, [runs[0], twin], tmp_path / "out")
    assert found["written"] == str(tmp_path / "out" / "soup")
    former, mean = weights(runs[0]), weights(tmp_path / "out" / "soup")
    assert former.keys() == mean.keys()
    assert all(torch.equal(former[name], mean[name]) for name in former)
    each = list(found["each"].values())
    assert [found["top1"], found["logits"]["top1"]] == each


def test_a_uniform_soup_is_the_mean_and_a_classifier_to_all_commands(
    colours: Path, runs: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    found = soup(colours, runs[:2], out)
    one, two, mean = weights(runs[0]), weights(runs[1]), weights(out / "soup")
    for name, value in mean.items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2)
    record = read_records(out / "metrics.json")["finetune_eval"]
    assert record["soup_of"] == record["init"] == [str(path) for path in runs[:2]]
    assert list(record["each"]) == record["init"]
    assert record["logits"].keys() == {"top1", "top5"}
    again = finetune.evaluate(EvaluateConfig.model_validate({"init": f"{out}/soup", "val": sets(colours)["val"]}))
    assert again["top1"] == found["top1"] == record["top1"]
    export.run(ExportConfig.model_validate({"init": f"{out}/soup", "output": f"{tmp_path}/exported"}))
    for init in (f"{out}/soup", f"{tmp_path}/exported"):
        text = predict.run(PredictConfig.model_validate({"init": init, "data": sets(colours)["val"]}))
        assert text.splitlines()[1].split(",")[1] in ("blue", "green", "red")
    finetune.run(finetune_config(colours, tmp_path / "further", init=f"{out}/soup", max_steps=1))


def test_a_greedy_soup_is_chosen_by_the_images_held_back(colours: Path, runs: list[Path], tmp_path: Path) -> None:
    """By hand: the accuracy of each run and of each soup on the third that no run was trained on."""
    found = greedy(colours, runs, tmp_path / "out")
    _, held_out, _ = open_splits(DataConfig(**sets(colours)["data"]), ValConfig.model_validate(SHARE))
    batch = LabelledDataset(held_out, 64).__getitems__([(0, index) for index in range(len(held_out))])
    states = [weights(path) for path in runs]

    def accuracy(numbers: Sequence[int]) -> float:
        model = build_classifier(num_classes=3, **ENCODER).eval()
        load_weights(model, {name: sum(states[n][name] for n in numbers) / len(numbers) for name in states[0]})  # type: ignore[misc]
        with torch.inference_mode():
            return topk_accuracy(model(normalise(batch.images)), batch.labels)["top1"]

    alone = [accuracy([number]) for number in range(3)]
    chosen: list[int] = []
    for number in sorted(range(3), key=lambda number: -alone[number]):
        if not chosen or accuracy([*chosen, number]) >= accuracy(chosen):
            chosen.append(number)
    assert alone[2] < max(alone)
    assert 2 not in chosen  # it would turn the soup's answers round
    assert found["soup_of"] == [str(runs[number]) for number in chosen]
    assert found["val"] == {"each": dict(zip(map(str, runs), alone, strict=True)), "soup": accuracy(chosen)}
    assert found["images"] == 12  # the test images, not those held back
    assert greedy(colours, runs, tmp_path / "out")["soup_of"] == found["soup_of"]  # again: the same, kept


def test_a_soup_of_averages_is_of_what_their_runs_evaluate(colours: Path, start: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"init": str(start), "ema": {"decay": 0.5, "warmup": False}, "max_steps": 3}
    runs = [tmp_path / "0", tmp_path / "1"]
    for seed, path in enumerate(runs):
        finetune.run(finetune_config(colours, path, seed=seed, **keys))
    soup(colours, runs, tmp_path / "out")
    one, two = (load_file(resolve_checkpoint(path) / "model.safetensors") for path in runs)
    trained = load_file(resolve_checkpoint(runs[0]) / "trained.safetensors")
    mean = weights(tmp_path / "out" / "soup")["head.weight"]
    assert not torch.equal(trained["head.weight"], one["head.weight"])
    torch.testing.assert_close(mean, (one["head.weight"] + two["head.weight"]) / 2)


def test_batch_norms_of_a_soup_see_training_images(colours: Path, tmp_path: Path) -> None:
    """Running statistics of averaged weights are no average: they are those of a forward pass in training mode."""
    torch.manual_seed(0)
    (tmp_path / "start").mkdir()
    save_weights(build_student(**CNN, objective="distil"), tmp_path / "start")
    runs = [tmp_path / "0", tmp_path / "1"]
    for seed, path in enumerate(runs):
        keys: dict[str, Any] = {"init": str(tmp_path / "start"), "seed": seed, "max_steps": 3}
        finetune.run(finetune_config(colours, path, **keys))
    with pytest.raises(ConfigError, match=r"batch norms, whose statistics must be taken anew .*: give data\.path"):
        soup(colours, runs, tmp_path / "out")
    soup(colours, runs, tmp_path / "out", data=sets(colours)["data"])  # 24 images, one batch
    found = load_model(tmp_path / "out" / "soup")
    expected = load_model(resolve_checkpoint(runs[0]))
    assert isinstance(expected, Classifier)
    load_weights(expected, average([weights(path) for path in runs]))
    statistic = next(name for name in weights(runs[0]) if name.endswith("running_mean"))
    averaged = expected.state_dict()[statistic].clone()
    train, _, _ = open_splits(DataConfig(**sets(colours)["data"]), ValConfig(**sets(colours)["val"]))
    batch = LabelledDataset(train, 64).__getitems__([(0, index) for index in range(len(train))])
    for module in expected.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # what is kept is this batch's alone
    with torch.no_grad():
        expected.train()(normalise(batch.images))
    of_expected, of_found = expected.state_dict(), found.state_dict()
    for name in (name for name in of_found if "running" in name):
        torch.testing.assert_close(of_found[name], of_expected[name])
    kept = of_found[statistic]
    assert not torch.allclose(kept, averaged)


def test_what_makes_no_soup(colours: Path, runs: list[Path], start: Path, tmp_path: Path) -> None:
    def trained(name: str, **keys: Any) -> Path:
        finetune.run(finetune_config(colours, tmp_path / name, max_steps=1, **keys))
        return tmp_path / name

    other_start = trained("other_start", init=str(begun(tmp_path / "start", 1)))
    scratch = trained("scratch", student=ENCODER)
    pooled = trained("pooled", init=str(start), pool="cls")
    two = {"path": str(tmp_path / "two"), "workers": 0}
    for name, folder in (("blue", "blue"), ("green", "green"), ("violet", "red")):
        (tmp_path / "two").mkdir(exist_ok=True)
        (tmp_path / "two" / name).symlink_to(colours / "train" / folder)
    renamed = trained("renamed", init=str(start), data=two, val=two)
    everything = trained("everything", init=str(start))
    export.run(ExportConfig.model_validate({"init": str(runs[0]), "output": f"{tmp_path}/exported"}))
    run, numbered = load_checkpoint(resolve_checkpoint(runs[0])), tmp_path / "numbered"
    identity = {**run.identity, "class_names": ["a", "b", "c"]}
    record = json.loads((run.path / "model.json").read_text())
    save_checkpoint(replace(run, path=numbered, identity=identity), weights(runs[0]), record)
    with pytest.raises(DataError, match=r"different classes than init=.*renamed: it lacks red"):
        soup(colours, [runs[0], renamed], tmp_path / "out")
    kept = tmp_path / "kept"
    soup(colours, runs[:2], kept)
    cases = [
        (other_start, tmp_path / "out", "started from other weights than .*; use combine=logits"),
        (scratch, tmp_path / "out", "was trained from scratch: a soup needs runs that started from one init"),
        (pooled, tmp_path / "out", r"is another model than .* \(pool=cls, mean\)"),
        (numbered, tmp_path / "out", "has other class_names than"),
        (tmp_path / "exported", tmp_path / "out", "doesn't say what it started from: for a soup give runs"),
        (runs[2], kept, "is a soup of other runs or images: choose another output"),
    ]
    for init, output, message in cases:
        with pytest.raises(PipelineError, match=message) as caught:
            soup(colours, [runs[0], init], output)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"everything was trained on other images than data\.path without val\.share"):
        greedy(colours, [runs[0], everything], tmp_path / "out")
    assert not (tmp_path / "out" / "soup").exists()
    assert "soup" in load_checkpoint(kept / "soup").identity


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["combine=uniform", "init=[a,b]"], "writes a soup of runs: give .*output"),
        (["combine=uniform", "init=[a]", "output=/o"], "writes a soup of runs: give"),
        (["combine=greedy", "init=[a,b]", "output=/o"], r"combine=greedy wants test\.path"),
        (["combine=uniform", "init=[a,b]", "output=/o", "test.path=/t"], r"test\.path is for combine=greedy"),
        (["combine=greedy", "init=[a,b]", "output=/o", "test.path=/v"], r"test\.path is val\.path"),
    ],
)
def test_keys_of_a_soup(keys: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(EvaluateConfig, None, ["val.path=/v", *keys])
