"""detect: training and scoring through the stage, resume, several processes, what it refuses, and a real over-fit."""

import io
import json
import os
import signal
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file

import cli
from pipeline.assembly.detectors import build_detector, load_detector
from pipeline.detection import Detector, DetectorConfig
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.models import build_student, save_weights
from pipeline.training.interruption import Interrupted
from pipeline.training.optim import parameter_groups
from stages import detect, finetune, pretrain, visualize
from stages.detect import DetectConfig
from tests.coco import scene_annotations, write_coco
from tests.test_stages.conftest import pretrain_config
from tests.test_stages.test_processes import forked_ranks

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = Path(__file__).parents[2] / "configs/coco_tiny.yaml"
STUDENT = {"name": "mrmae_vit_tiny_patch16", "patch_size": 8, "dim": 48, "depth": 2, "num_heads": 3}
DETECTOR = {"window": 4, "channels": 16, "anchors": [8, 16, 24, 32, 48], "rois": 16, "score_threshold": 0.0}


@pytest.fixture(scope="module")
def annotated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, file = write_coco(tmp_path_factory.mktemp("coco"))
    return {"images": str(folder), "annotations": str(file)}


def detect_config(annotated: dict[str, Any], output: Path, **changes: Any) -> DetectConfig:
    keys: dict[str, Any] = {
        "data": {"train": annotated, "val": annotated, "workers": 0},
        "output": str(output),
        "student": STUDENT,
        "image_size": 64,
        "detector": DETECTOR,
        "optim": {"lr": 1e-3, "warmup_epochs": 0, "layer_decay": 0.7},
        "batch_size": 2,
        "max_steps": 4,
        "eval_every": 1000,
        "log_every": 1,
        "tensorboard": False,
    }
    return DetectConfig.model_validate({**keys, **changes})


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(output / f"checkpoints/step-{step:08d}/model.safetensors")


@pytest.fixture(scope="module")
def trained(annotated: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[DetectConfig, dict[str, Any]]:
    """A run that finds something, and what its training said."""
    output = tmp_path_factory.mktemp("trained") / "out"
    config = detect_config(annotated, output, max_steps=60, jitter={"scale": [1.0, 1.0]}, pictures=3)
    return config, detect.run(config)


def test_training_writes_what_every_run_writes(annotated: dict[str, Any], tmp_path: Path) -> None:
    facts = detect.run(detect_config(annotated, tmp_path / "out", accum_iter=2, tensorboard=True))
    assert {"loss", "loss_mask", "box_AP", "mask_AP50", "lr"} <= set(facts)
    assert [row["step"] for row in rows(tmp_path / "out") if "loss" in row] == [1, 2, 3, 4]
    assert (tmp_path / "out/tensorboard").is_dir()
    assert (tmp_path / "out/config.yaml").is_file()
    record = json.loads((tmp_path / "out/checkpoints/best/checkpoint.json").read_text())
    assert record["metrics"]["box_AP"] == max(row["box_AP"] for row in rows(tmp_path / "out") if "box_AP" in row)


def test_scoring_a_run_again_gives_the_same_and_equals_pycocotools(
    annotated: dict[str, Any], trained: tuple[DetectConfig, dict[str, Any]]
) -> None:
    """predictions.json is in COCO's result format: here it is scored by pycocotools alone, from the files."""
    config, facts = trained
    scored = detect.run(config, eval_only=True)
    assert scored == {key: facts[key] for key in scored}
    recorded = json.loads((config.output / "metrics.json").read_text())["detect"]
    assert scored == {key: recorded[key] for key in scored}
    assert recorded.keys() - scored.keys() == {"images", "made"}
    results = json.loads((config.output / "predictions.json").read_text())
    assert {one["category_id"] for one in results} <= {3, 7, 90}
    for kind, iou_type, unwanted in (("box", "bbox", "segmentation"), ("mask", "segm", "bbox")):
        with redirect_stdout(io.StringIO()):
            truth = COCO(annotated["annotations"])
            mine = [{key: value for key, value in one.items() if key != unwanted} for one in results]
            scoring = COCOeval(truth, truth.loadRes(mine), iou_type)
            scoring.evaluate()
            scoring.accumulate()
            scoring.summarize()
        assert scored[f"{kind}_AP"] == pytest.approx(scoring.stats[0], abs=1e-12)
        assert scored[f"{kind}_AP50"] == pytest.approx(scoring.stats[1], abs=1e-12)
    assert scored["box_AP50"] > 0.01  # there was something to compare
    assert np.asarray(Image.open(config.output / "predictions.png")).std() > 10


def test_pictures_go_through_the_detector_a_few_at_a_time(
    annotated: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = detect_config(annotated, tmp_path / "out", max_steps=1, pictures=3, eval_batch_size=2)
    detect.run(config)
    seen: list[int] = []
    real = Detector.detect

    def spy(self: Detector, images: torch.Tensor, *rest: Any) -> Any:
        seen.append(len(images))
        return real(self, images, *rest)

    monkeypatch.setattr(Detector, "detect", spy)
    monkeypatch.setattr(visualize, "_CHUNK", 2)
    detect.run(config, eval_only=True)
    keys = {"init": str(tmp_path / "out"), "data": {"path": annotated["images"]}, "count": 3}
    visualize.run(visualize.VisualizeConfig.model_validate(keys))
    assert seen == [2, 2, 2, 1, 2, 1]  # scored; drawn beside annotations; drawn alone


def test_a_stopped_run_goes_on_bit_for_bit(
    annotated: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the second step; jitter, drop-path and the sampling of proposals are functions of the step."""
    keys: dict[str, Any] = {"drop_path": 0.2, "max_steps": 5}
    detect.run(detect_config(annotated, tmp_path / "whole", **keys))
    calls = []
    losses = detect._losses

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(*arguments)

    monkeypatch.setattr(detect, "_losses", interrupted)
    with pytest.raises(Interrupted, match="stopped at step 2 of 5"):
        detect.run(detect_config(annotated, tmp_path / "parts", **keys))
    detect.run(detect_config(annotated, tmp_path / "parts", **keys))
    whole, parts = weights(tmp_path / "whole", 5), weights(tmp_path / "parts", 5)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert [row["step"] for row in rows(tmp_path / "parts") if "loss" in row] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", ["mrmae_vit_tiny_patch16", "mrmae_convvit_small_patch16"])
def test_it_starts_from_a_pretrained_run(
    annotated: dict[str, Any], image_tree: Path, tmp_path: Path, kind: str
) -> None:
    """At a learning rate of 0 the encoder is the pre-trained one, its positions resampled from 6 × 6 to 8 × 8."""
    student = {**STUDENT, "name": kind, "image_size": 48, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
    data = {"path": str(image_tree), "workers": 0}
    views = {"image_size": 48}
    pretrain.run(
        pretrain_config(
            tmp_path / "mae", data=data, student=student, views=views, mimic={"objective": "mae"}, max_steps=2,
            mask={"focus": "random"},
        )
    )  # fmt: skip
    config = detect_config(
        annotated, tmp_path / "out", init=str(tmp_path / "mae"), student=None, max_steps=1, optim={"lr": 0.0}
    )
    detect.run(config)
    before, after = weights(tmp_path / "mae", 2), weights(tmp_path / "out", 1)
    names = [name.removeprefix("rcnn.backbone.encoder.") for name in after if ".encoder." in name]
    assert len([name for name in names if name.startswith("blocks")]) > 20
    same = {name: torch.equal(before[name], after[f"rcnn.backbone.encoder.{name}"]) for name in names}
    assert [name for name, equal in same.items() if not equal] == ["pos_embed"]


def test_other_initial_weights_are_another_run(annotated: dict[str, Any], tmp_path: Path) -> None:
    """And single keys of the student go over what the checkpoint says of it."""
    for seed in (0, 1):
        torch.manual_seed(seed)
        (tmp_path / str(seed)).mkdir()
        decoder = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
        save_weights(build_student(**STUDENT, **decoder, image_size=64, objective="mae"), tmp_path / str(seed))
    keys = {"student": {"gradient_checkpointing": True}, "max_steps": 1}
    detect.run(detect_config(annotated, tmp_path / "out", init=str(tmp_path / "0"), **keys))
    encoder = load_detector(tmp_path / "out").spec["encoder"]
    assert {key: encoder[key] for key in STUDENT} == STUDENT
    assert encoder["gradient_checkpointing"] is True
    with pytest.raises(CheckpointError, match=r"holds a run with init=weights \w{16}, this one has init=weights"):
        detect.run(detect_config(annotated, tmp_path / "out", init=str(tmp_path / "1"), **keys))


def test_layer_decay_reaches_the_encoder(annotated: dict[str, Any], tmp_path: Path) -> None:
    """Convolution stages and positions at layer 0, block i at i + 1, pyramid and heads at the full rate, undecayed."""
    encoder = {"name": "mrmae_convvit_small_patch16", "image_size": 64, "patch_size": 8, "dim": 48, "num_heads": 3}
    model, ids = build_detector(
        {**encoder, "depth": [1, 1, 2]}, [(1, "one")], **DetectorConfig(channels=16).model_dump()
    )
    body = "rcnn.backbone.encoder."
    assert {ids[f"{body}{name}"] for name in ("pos_embed", "patch_embed1.proj.weight", "blocks2.0.attn.weight")} == {0}
    assert [ids[f"{body}blocks3.{block}.attn.qkv.weight"] for block in (0, 1)] == [1, 2]
    assert {layer for name, layer in ids.items() if not name.startswith(body)} == {3}
    names = {id(p): name for name, p in model.named_parameters()}
    undecayed = set()
    for group in parameter_groups(model, 0.1, ids, 0.7):
        layers = {ids[names[id(p)]] for p in group["params"]}
        assert {group["lr_scale"]} == {0.7 ** (3 - layer) for layer in layers}
        undecayed |= {names[id(p)] for p in group["params"] if not group["weight_decay"]}
    assert f"{body}pos_embed" in undecayed
    assert not [name for name in names.values() if "norm" in name and name not in undecayed]


def test_an_average_of_the_weights_is_what_is_scored(annotated: dict[str, Any], tmp_path: Path) -> None:
    config = detect_config(annotated, tmp_path / "out", ema={"decay": 0.5})
    trained = detect.run(config)
    last = tmp_path / "out/checkpoints/step-00000004"
    average, final = (load_file(last / f"{name}.safetensors") for name in ("model", "trained"))
    name = "rcnn.roi_heads.box_predictor.cls_score.weight"
    assert not torch.equal(average[name], final[name])
    scored = detect.run(config, eval_only=True)
    assert scored == {key: trained[key] for key in scored}


def test_bf16(annotated: dict[str, Any], tmp_path: Path) -> None:
    AcceleratorState._reset_state(True)  # precision is chosen once a process
    try:
        facts = detect.run(detect_config(annotated, tmp_path / "out", precision="bf16", max_steps=2))
    finally:
        AcceleratorState._reset_state(True)
    assert np.isfinite(facts["loss"])


def test_two_processes_train_and_score_as_one_scores(annotated: dict[str, Any], tmp_path: Path) -> None:
    def written(value: Any) -> str:
        return json.dumps(value).replace('"', "")

    data = {"train": annotated, "val": annotated, "workers": 0}
    both = forked_ranks(
        2, "detect", f"data={written(data)}", f"student={written(STUDENT)}", f"detector={written(DETECTOR)}",
        "image_size=64", "batch_size=2", "max_steps=2", "log_every=1", "tensorboard=false", f"output={tmp_path}/two",
    )  # fmt: skip
    assert [done.returncode for done in both] == [0, 0], both
    scored = detect.run(detect_config(annotated, tmp_path / "two"), eval_only=True)
    row = next(row for row in rows(tmp_path / "two") if "box_AP" in row)
    assert scored == pytest.approx({key: row[key] for key in scored}, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student": None}, ConfigError, "give init=RUN, or student.name"),
        ({"init": "/nowhere"}, CheckpointError, "/nowhere does not exist"),
        ({"image_size": 72}, ConfigError, "image_size=72: give a multiple of 16"),
        ({"detector": {**DETECTOR, "global_blocks": [9]}}, ConfigError, "name blocks from 0 to 1"),
    ],
)
def test_what_it_refuses(
    annotated: dict[str, Any], tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        detect.run(detect_config(annotated, tmp_path / "out", **changes))


def test_training_needs_training_data_of_the_same_categories(annotated: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'data\.train' is missing"):
        detect.run(detect_config(annotated, tmp_path / "out", data={"val": annotated}))
    content = scene_annotations()
    content["categories"][0]["name"] = "scarlet"
    folder, file = write_coco(tmp_path, content)
    other = {"images": str(folder), "annotations": str(file)}
    with pytest.raises(DataError, match="different categories"):
        detect.run(detect_config(annotated, tmp_path / "out", data={"train": annotated, "val": other}))
    detect.run(detect_config(annotated, tmp_path / "out", max_steps=1))
    with pytest.raises(DataError, match="other categories than the detector"):
        detect.run(detect_config(annotated, tmp_path / "out", data={"val": other}), eval_only=True)


def test_scoring_wants_a_detector(annotated: dict[str, Any], image_tree: Path, tmp_path: Path) -> None:
    sets = {name: {"path": str(image_tree), "workers": 0} for name in ("data", "val")}
    tuned = {**sets, "output": str(tmp_path / "tuned"), "student": STUDENT, "image_size": 48, "tensorboard": False}
    finetune.run(finetune.FinetuneConfig.model_validate({**tuned, "batch_size": 8, "max_steps": 1}))
    with pytest.raises(CheckpointError, match="holds no detector"):
        detect.run(detect_config(annotated, tmp_path / "tuned"), eval_only=True)


def test_a_malformed_annotation_is_one_line_on_the_command_line(tmp_path: Path) -> None:
    content = scene_annotations()
    content["annotations"][2]["bbox"] = "wide"
    folder, file = write_coco(tmp_path, content)
    result = CliRunner().invoke(
        cli.main, ["detect", "--eval", f"data.val.images={folder}", f"data.val.annotations={file}", "output=x"]
    )
    assert result.exit_code == 2
    assert "annotation 498: bbox: " in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_visualize_draws_what_a_detector_finds(
    annotated: dict[str, Any], trained: tuple[DetectConfig, dict[str, Any]], tmp_path: Path
) -> None:
    keys = {"init": str(trained[0].output), "data": {"path": annotated["images"]}, "count": 3}
    pictures = {}
    for score in (0.0, 1.0):
        output = tmp_path / f"{score}.png"
        facts = visualize.run(visualize.VisualizeConfig.model_validate({**keys, "min_score": score, "output": output}))
        pictures[score] = facts["instances"], output.read_bytes()
    assert pictures[0.0][0] > pictures[1.0][0] == 0
    assert pictures[0.0][1] != pictures[1.0][1]
    with pytest.raises(ConfigError, match="is a detector: leave cache and teacher out"):
        visualize.run(visualize.VisualizeConfig.model_validate({**keys, "teacher": {"spec": "dino_vits16"}}))


def tiny(output: Path, *more: str) -> dict[str, Any]:
    """The chain of configs/coco_tiny.yaml through the command line, and what --eval wrote."""
    common = ["--config", str(CONFIG), f"output={output}", "tensorboard=false", *more]
    for flags in ([], ["--eval", "pictures=2"]):
        result = CliRunner().invoke(cli.main, ["detect", *flags, *common])
        assert result.exit_code == 0, result.output
    written: dict[str, Any] = json.loads((output / "metrics.json").read_text())["detect"]
    return written


def test_the_tiny_config_runs(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On real photos, with a real ViT-Ti's public weights; two steps at 64 px."""
    monkeypatch.setenv("MRMAE_DATA", str(real_data))
    small = ["image_size=64", "max_steps=2", "detector.rois=16", "detector.channels=16", "data.workers=0"]
    limits = [f"data.{split}.limit=4" for split in ("train", "val")]
    figures = tiny(tmp_path / "out", *small, *limits)
    assert 0 <= figures["box_AP"] <= 1
    assert (tmp_path / "out/predictions.png").is_file()


@pytest.mark.slow
def test_sixteen_photos_are_learnt_by_heart(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """800 steps, 10 minutes of one core: box AP50 of 0.8 or more on the images trained on."""
    monkeypatch.setenv("MRMAE_DATA", str(real_data))
    figures = tiny(tmp_path / "out")
    assert figures["box_AP50"] >= 0.8
