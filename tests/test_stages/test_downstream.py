"""finetune, knn and linear-probe: from a pre-trained run, from scratch, and what they refuse."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.assembly.teachers import load_teacher
from pipeline.configs.teachers import TeacherConfig
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.models import load_model, save_weights
from pipeline.teachers import Teacher
from pipeline.training.checkpoint import resolve_checkpoint
from stages import finetune, knn, linear_probe, pretrain
from tests.test_stages.conftest import ENCODER, MICRO, TEACHER, finetune_config, pretrain_config, sets


def test_finetune_from_a_run_learns_and_keeps_the_best(colours: Path, student_run: Path, tmp_path: Path) -> None:
    facts = finetune.run(finetune_config(colours, tmp_path / "out", init=str(student_run)))
    assert facts["top1"] > 0.9
    assert facts["top5"] == 1.0
    record = json.loads((tmp_path / "out/checkpoints/best/checkpoint.json").read_text())
    assert record["metrics"]["top1"] == max(
        row["top1"]
        for row in map(json.loads, (tmp_path / "out/metrics.jsonl").read_text().splitlines())
        if "top1" in row
    )


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_finetune_from_scratch_with_the_whole_recipe(colours: Path, tmp_path: Path, pool: str) -> None:
    config = finetune_config(
        colours, tmp_path / "out", student=ENCODER, pool=pool, augment={}, drop_path=0.1, max_steps=3, accum_iter=2
    )
    assert 0 <= finetune.run(config)["top1"] <= 1


@pytest.mark.parametrize("ema", [{}, {"decay": 0.9}], ids=["plain", "ema"])
def test_a_finetuned_run_resumes_bit_for_bit(colours: Path, tmp_path: Path, ema: dict[str, float]) -> None:
    """Mixup, erasing and RandAugment draw from generators that are functions of the step or the sample."""
    keys: dict[str, Any] = {"student": ENCODER, "augment": {}, "max_steps": 6, "log_every": 1, "drop_path": 0.2}
    keys |= {"ema": ema}
    finetune.run(finetune_config(colours, tmp_path / "whole", **keys))
    finetune.run(finetune_config(colours, tmp_path / "parts", **keys, checkpoint_every=4, keep_checkpoints=3))
    newest = tmp_path / "parts/checkpoints/step-00000006"
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    finetune.run(finetune_config(colours, tmp_path / "parts", **keys, checkpoint_every=4, keep_checkpoints=3))
    for file in ["model.safetensors"] + ["trained.safetensors"] * bool(ema):
        whole, parts = (
            (tmp_path / name / "checkpoints/step-00000006" / file).read_bytes() for name in ("whole", "parts")
        )
        assert whole == parts


def test_an_average_is_what_is_measured_and_kept(colours: Path, tmp_path: Path) -> None:
    """`model.safetensors` is the average, in every checkpoint; the trained weights stand beside it for a resume."""
    keys: dict[str, Any] = {"student": ENCODER, "max_steps": 4, "ema": {"decay": 0.9}}
    finetune.run(finetune_config(colours, tmp_path / "ema", **keys))
    finetune.run(finetune_config(colours, tmp_path / "plain", **{**keys, "ema": {}}))
    newest = tmp_path / "ema/checkpoints/step-00000004"
    average, trained = (load_file(newest / f"{name}.safetensors") for name in ("model", "trained"))
    plain = load_file(tmp_path / "plain/checkpoints/step-00000004/model.safetensors")
    assert all(torch.equal(trained[name], plain[name]) for name in plain)  # the average doesn't touch the training
    assert not torch.equal(average["head.weight"], trained["head.weight"])
    assert not (tmp_path / "ema/checkpoints/best/trained.safetensors").exists()
    with pytest.raises(CheckpointError, match="ema"):
        finetune.run(finetune_config(colours, tmp_path / "ema", **{**keys, "ema": {}}))


@pytest.mark.parametrize("subject", ["init", "student", "teacher", "pixels"])
def test_knn_and_probe_take_every_subject(colours: Path, student_run: Path, tmp_path: Path, subject: str) -> None:
    value: Any = {"init": str(student_run), "student": MICRO, "teacher": TEACHER, "pixels": True}[subject]
    keys = {**sets(colours), "image_size": 64, subject: value, "output": str(tmp_path)}
    near = knn.run(knn.KnnConfig.model_validate({**keys, "k": 3}))
    # LARS moves the weights by a share of their length: so few steps want large rates.
    rates = {"batch_size": 8, "epochs": 30, "blrs": [100.0, 300.0, 1000.0, 3000.0]}
    probe = linear_probe.run(linear_probe.LinearProbeConfig.model_validate({**keys, **rates}))
    assert near["top1"] > 0.9  # colour is in everything, even in untrained features
    assert probe["top1"] > 0.9
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["knn"]["top1"] == near["top1"]
    assert written["linear_probe"]["top1"] == probe["top1"]


def test_the_second_command_reads_what_the_first_one_kept(
    colours: Path, student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {**sets(colours), "init": str(student_run), "output": str(tmp_path), "k": 3}
    first = knn.run(knn.KnnConfig.model_validate(keys))
    assert len(list((tmp_path / "features").iterdir())) == 2

    def refuse(*_: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr("pipeline.assembly.frozen_features.extract_features", refuse)
    assert knn.run(knn.KnnConfig.model_validate(keys)) == first
    probe = {key: value for key, value in keys.items() if key != "k"}
    linear_probe.run(linear_probe.LinearProbeConfig.model_validate({**probe, "epochs": 1}))
    for changes in ({"crop": 0.5}, {"init": None, "student": MICRO}, {"data": {**keys["data"], "limit": 9}}):
        with pytest.raises(AssertionError, match="computed again"):
            knn.run(knn.KnnConfig.model_validate({**keys, **changes}))


def test_a_disk_too_full_to_keep_features_costs_no_result(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fill(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("pipeline.tensor_files.save_file", fill)
    keys = {**sets(colours), "pixels": True, "image_size": 8, "k": 3, "features": str(tmp_path)}
    assert knn.run(knn.KnnConfig.model_validate(keys))["top1"] > 0.9
    assert "the features can't be kept for the next command" in caplog.text
    assert os.listdir(tmp_path) == []


def write_noise(folder: Path, seed: int) -> None:
    """Two classes of noise in files whose names and lengths don't depend on the seed."""
    random = np.random.default_rng(seed)
    for number in range(12):
        file = folder / str(number % 2) / f"{number}.bmp"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(file)


def test_features_of_equal_names_and_lengths_are_kept_apart(tmp_path: Path) -> None:
    """Training and validation images, and images that were changed in place."""
    for split, seed in (("train", 0), ("val", 1)):
        write_noise(tmp_path / split, seed)
    keys = {
        "data": {"path": str(tmp_path / "train"), "workers": 0}, "val": {"path": str(tmp_path / "val"), "workers": 0},
        "pixels": True, "image_size": 8, "crop": 1.0, "k": 1,
    }  # fmt: skip
    kept = {**keys, "features": str(tmp_path / "features")}

    def top1(keys: dict[str, Any]) -> float:
        return float(knn.run(knn.KnnConfig.model_validate(keys))["top1"])

    assert top1(kept) == top1(keys) < 1  # of shared features each image would be its own neighbour
    write_noise(tmp_path / "val", 0)
    assert top1(kept) == top1(keys) == 1
    write_noise(tmp_path / "train", 2)
    assert top1(kept) == top1(keys) < 1


def test_teachers_of_equal_weights_keep_features_apart(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QuickGELU has no parameters: a CLIP and its quickgelu twin, from one local file, have equal weights."""
    keys = {**sets(colours), "teacher": TEACHER, "output": str(tmp_path), "k": 3}
    knn.run(knn.KnnConfig.model_validate(keys))

    def twin(config: TeacherConfig, device: torch.device) -> Teacher:
        teacher = load_teacher(config, device)
        teacher.spec = f"{teacher.spec}-twin"
        return teacher

    monkeypatch.setattr("pipeline.assembly.subjects.load_teacher", twin)
    knn.run(knn.KnnConfig.model_validate(keys))
    assert len(list((tmp_path / "features").iterdir())) == 4


def test_the_probe_warns_at_the_edge_of_its_rates(colours: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = {**sets(colours), "pixels": True, "image_size": 8, "epochs": 30, "batch_size": 8}

    def said(*blrs: float) -> str:
        caplog.clear()
        linear_probe.run(linear_probe.LinearProbeConfig.model_validate({**keys, "blrs": blrs}))
        return "".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)

    assert "the best of blrs is the outermost, 300: a better rate may lie beyond; add for instance 900" in said(
        0.01, 300.0, 0.1
    )
    assert "the outermost, 300: a better rate may lie beyond; add for instance 100" in said(1e7, 1e6, 300.0)
    assert said(0.01, 300.0, 1e7) == said(300.0) == ""
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        linear_probe.LinearProbeConfig.model_validate({**keys, "batch_size": 1})
    with pytest.raises(ValueError, match="at least 1 item"):
        linear_probe.LinearProbeConfig.model_validate({**keys, "blrs": []})
    keys["epochs"] = 1
    assert "steps train a classifier but little: lower batch_size or raise epochs" in said(0.01, 300.0, 1e7)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_init_takes_a_lone_file_by_the_reference_codes_names(
    colours: Path, student_run: Path, tmp_path: Path, suffix: str
) -> None:
    """As people hold public checkpoints: without a description, so `student` has to say what it is."""
    state = load_file(max((student_run / "checkpoints").iterdir()) / "model.safetensors")
    public = {name: value for name, value in state.items() if not name.startswith("mimic")}
    assert {"cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "decoder_pred.bias"} <= set(public)
    file = tmp_path / f"public{suffix}"
    if suffix == ".pth":
        torch.save({"model": public}, file)
    else:
        save_file(public, file)
    keys = {**sets(colours), "image_size": 64, "init": str(file)}
    known = knn.run(knn.KnnConfig.model_validate({**sets(colours), "image_size": 64, "init": str(student_run)}))
    assert knn.run(knn.KnnConfig.model_validate({**keys, "student": MICRO})) == known
    with pytest.raises(ConfigError, match="doesn't say what it is"):
        knn.run(knn.KnnConfig.model_validate(keys))
    assert finetune.run(finetune_config(colours, tmp_path / "tuned", init=str(file), student=ENCODER))["top1"] > 0.9
    data = {"path": str(colours / "train"), "workers": 0}
    pretrain.run(
        pretrain_config(tmp_path / "more", data=data, cache={"path": str(student_run.parent / "cache")}, init=str(file))
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"init": "/nowhere"}, CheckpointError, "/nowhere does not exist"),
        ({"student": {**ENCODER, "dim": 96}}, CheckpointError, "another shape"),
        ({"student": {"depth": 1}, "init": None}, ConfigError, "give init=RUN, or student.name"),
        ({"student": {"name": "mrmae_vit_gigantic"}, "init": None}, ConfigError, "mrmae_vit_gigantic"),
        ({"val": {"path": "/nowhere"}}, DataError, "no such file or folder"),
    ],
)
def test_finetune_refuses_what_does_not_fit(
    colours: Path, student_run: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        finetune.run(finetune_config(colours, tmp_path / "out", **{"init": str(student_run), **changes}))


def test_other_initial_weights_are_another_run(colours: Path, student_run: Path, tmp_path: Path) -> None:
    """By content: the same weights at another path go on, others at the same path don't."""
    copy, changed = tmp_path / "copy", tmp_path / "changed"
    model = load_model(resolve_checkpoint(student_run))
    for folder in (copy, changed):
        folder.mkdir()
        save_weights(model, folder)
        with torch.no_grad():
            model.encoder.patch_embed.proj.weight.add_(1e-3)
    keys: dict[str, Any] = {"init": str(student_run), "max_steps": 1}
    facts = finetune.run(finetune_config(colours, tmp_path / "out", **keys))
    assert finetune.run(finetune_config(colours, tmp_path / "out", **{**keys, "init": str(copy)})) == facts
    for changes in ({"init": str(changed)}, {"init": None, "student": ENCODER}):
        with pytest.raises(
            CheckpointError, match=r"holds a run with init=weights \w{16}, this one has init="
        ) as caught:
            finetune.run(finetune_config(colours, tmp_path / "out", **{**keys, **changes}))
        assert "\n" not in str(caught.value)


def test_single_keys_go_over_what_the_checkpoint_says(colours: Path, student_run: Path, tmp_path: Path) -> None:
    keys = {"init": str(student_run), "student": {"gradient_checkpointing": True}, "max_steps": 1}
    finetune.run(finetune_config(colours, tmp_path / "out", **keys))
    spec = load_model(resolve_checkpoint(tmp_path / "out")).spec
    assert {key: spec[key] for key in ENCODER} == ENCODER
    assert spec["gradient_checkpointing"] is True
    said = (tmp_path / "out/config.yaml").read_text()
    assert "name: mrmae_vit_tiny_patch16" in said
    assert "mrmae_vit_base_patch16" not in said


def test_classes_must_agree(colours: Path, image_tree: Path, tmp_path: Path) -> None:
    flat = {"path": str(colours / "train/red"), "workers": 0}
    keys = sets(colours)
    with pytest.raises(DataError, match="different classes"):
        finetune.run(finetune_config(colours, tmp_path / "a", student=ENCODER, val={"path": str(image_tree)}))
    with pytest.raises(DataError, match="no class folders"):
        finetune.run(finetune_config(colours, tmp_path / "b", student=ENCODER, data=flat, val=flat))
    with pytest.raises(DataError, match="different classes"):
        knn.run(knn.KnnConfig.model_validate({**keys, "val": {"path": str(image_tree)}, "student": MICRO}))


def test_one_subject_at_a_time(colours: Path, student_run: Path) -> None:
    with pytest.raises(ValueError, match="give one of init"):
        knn.KnnConfig.model_validate({**sets(colours), "init": str(student_run), "pixels": True})
    with pytest.raises(ConfigError, match=r"give init=RUN, or student\.name"):
        knn.run(knn.KnnConfig.model_validate(sets(colours)))
