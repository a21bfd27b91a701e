"""Few images and few keys: what is left out follows the set, its cache and the run so far."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_digits

import cli
from pipeline.configs.training import OptimConfig
from pipeline.errors import TrainingError
from pipeline.evaluation.probe import fitting_lrs
from pipeline.training.checkpoint import newest_checkpoint
from stages import finetune, knn, linear_probe, pretrain
from tests.test_stages.conftest import ENCODER, MICRO, finetune_config, pretrain_config


def pretrained(output: Path) -> tuple[int, int]:
    """(batch size, step) of the run's newest checkpoint."""
    newest = newest_checkpoint(output / "checkpoints")
    assert newest is not None
    return newest.identity["batch_size"], newest.step


def test_the_batch_fits_the_images(image_tree: Path, cache: Path, tmp_path: Path) -> None:
    data = {"path": str(image_tree), "workers": 0}
    config = pretrain_config(tmp_path / "run", data=data, cache={"path": str(cache)}, batch_size="auto", optim={})
    pretrain.run(config)
    assert pretrained(tmp_path / "run") == (2, 6)  # 24 images: 12 steps an epoch
    settled = OmegaConf.load(tmp_path / "run/config.yaml")
    assert settled.batch_size == 2
    assert settled.optim.lr == 6e-4 == OptimConfig().peak_lr(1024)
    given = pretrain_config(
        tmp_path / "run", data=data, cache={"path": str(cache)}, batch_size=2, optim={}, max_steps=8
    )
    pretrain.run(given.model_copy(update={"epochs": 2}))  # the same run, its batch as a number
    assert OmegaConf.load(tmp_path / "run/config.yaml").optim.lr == 6e-4


def test_a_run_that_goes_on_keeps_its_batch(image_tree: Path, cache: Path, tmp_path: Path) -> None:
    keys = {"data": {"path": str(image_tree), "workers": 0}, "cache": {"path": str(cache)}}
    pretrain.run(pretrain_config(tmp_path / "run", **keys, batch_size=8, max_steps=2, optim={}))
    pretrain.run(pretrain_config(tmp_path / "run", **keys, batch_size="auto", max_steps=3, optim={}))
    assert pretrained(tmp_path / "run") == (8, 3)
    assert OmegaConf.load(tmp_path / "run/config.yaml").optim.lr is None  # a run from before auto set the rate, too
    pretrain.run(pretrain_config(tmp_path / "run", **keys, batch_size="auto", max_steps=4, optim={"lr": 1e-3}))
    assert OmegaConf.load(tmp_path / "run/config.yaml").optim.lr == 1e-3  # a given rate stays


def test_one_image_more_does_not_end_a_fine_tuning(colours: Path, tmp_path: Path) -> None:
    """Mixup wants even micro-batches, and auto gives them."""
    mixed = {"augment": {"mixup": 0.8}, "student": ENCODER, "batch_size": "auto", "max_steps": 2}
    finetune.run(finetune_config(colours, tmp_path / "run", **mixed))
    assert pretrained(tmp_path / "run") == (2, 2)
    with pytest.raises(TrainingError, match=r"batch_size=1024 asks for more than the 24 images"):
        finetune.run(finetune_config(colours, tmp_path / "other", **(mixed | {"batch_size": 1024})))


def test_the_student_has_the_size_of_the_cached_views(image_tree: Path, cache: Path, tmp_path: Path) -> None:
    student = {key: value for key, value in MICRO.items() if key != "image_size"}
    data = {"path": str(image_tree), "workers": 0}
    pretrain.run(pretrain_config(tmp_path / "run", data=data, cache={"path": str(cache)}, student=student))
    assert OmegaConf.load(tmp_path / "run/config.yaml").student.image_size == 64


def test_the_student_has_the_grid_of_the_cache(
    image_tree: Path, make_cache: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = make_cache(teacher__image_size=128)  # 8 x 8 tokens of views of 64 pixels
    data = {"path": str(image_tree), "workers": 0}
    with caplog.at_level(logging.INFO):
        pretrain.run(pretrain_config(tmp_path / "run", data=data, cache={"path": str(cache)}, max_steps=2))
    assert OmegaConf.load(tmp_path / "run/config.yaml").student.patch_size == 8
    assert "student.patch_size=8: with it the student has the teacher's grid" in caplog.text


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """450 scans of ten digits, in class folders."""
    root, scans = tmp_path_factory.mktemp("digits"), load_digits()
    for number in range(450):
        folder = root / str(scans.target[number])
        folder.mkdir(exist_ok=True)
        pixels = (scans.images[number] * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def test_the_default_probe_of_a_small_set_is_no_worse_than_its_neighbours(digits: Path) -> None:
    keys = {"data": {"path": str(digits), "workers": 0}, "val": {"share": 0.33, "workers": 0}}
    keys |= {"pixels": True, "image_size": 8, "crop": 1.0}
    neighbours = knn.run(knn.KnnConfig.model_validate(keys))["top1"]
    probe = linear_probe.run(linear_probe.LinearProbeConfig.model_validate(keys))
    assert neighbours > 0.85
    assert probe["top1"] > neighbours - 0.05
    former = {"batch_size": 4096, "blrs": [0.02, 0.05, 0.1, 0.2, 0.5]}  # MAE's, for a million images
    assert linear_probe.run(linear_probe.LinearProbeConfig.model_validate(keys | former))["top1"] < neighbours - 0.1


def test_large_sets_keep_maes_probe() -> None:
    assert fitting_lrs(28_080) == pytest.approx([blr * 16 for blr in (0.02, 0.05, 0.1, 0.2, 0.5)])


def test_a_share_of_one_folder_validates(colours: Path, tmp_path: Path) -> None:
    """From the command line: fine-tuning, its --eval, and what frozen features find, on the same images."""
    data = [f"data.path={colours}/train", "data.workers=0", "val.share=0.25", "val.workers=0"]
    student = [f"student.{key}={value}" for key, value in ENCODER.items()]

    def call(*words: str) -> str:
        result = CliRunner().invoke(cli.main, list(words))
        assert result.exit_code == 0, result.output
        return result.output

    call("finetune", *data, *student, "max_steps=2", "tensorboard=false", f"output={tmp_path}/run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    evaluated = call("finetune", "--eval", *data, f"init={tmp_path}/run", f"output={tmp_path}/run")
    assert "images  6" in evaluated
    record = json.loads((tmp_path / "run/metrics.json").read_text())["finetune_eval"]
    assert record["top1"] == pytest.approx([row["top1"] for row in rows if "top1" in row][-1])
    for command in ("knn", "linear-probe"):
        assert "top1" in call(command, *data, f"init={tmp_path}/run")
    missing = CliRunner().invoke(cli.main, ["finetune", "--eval", *data[2:], f"init={tmp_path}/run"])
    assert missing.exit_code == 2
    assert "val.share=0.25 is a share of data.path: give data.path=..., as in training" in missing.output
