"""Models of timm as students, through every stage that takes one."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import stages.export
from pipeline.assembly.detectors import build_detector
from pipeline.assembly.initial_weights import read_init
from pipeline.assembly.students import load_encoder
from pipeline.assembly.teachers import load_teacher
from pipeline.configs.models import StudentConfig
from pipeline.configs.teachers import TeacherConfig
from pipeline.errors import CheckpointError, ConfigError, TeacherError
from pipeline.models import build_classifier, save_weights
from pipeline.models.timm_names import timm_model
from pipeline.overrides import override_words
from pipeline.teachers import Teacher, build_teacher
from pipeline.teachers.timm_vit import TimmBackbone
from pipeline.training.checkpoint import resolve_checkpoint
from stages import finetune, knn, linear_probe, pretrain
from stages.configs.export import ExportConfig
from stages.configs.finetune import EvaluateConfig
from stages.configs.knn import KnnConfig
from stages.configs.linear_probe import LinearProbeConfig
from tests.test_stages.conftest import MICRO, finetune_config, pretrain_config, sets
from tests.test_stages.test_processes import forked_ranks

SMALL = {"dim": 48, "depth": 2, "num_heads": 3}
DINOV3 = "timm:vit_small_patch16_dinov3"
DECODER = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}


@pytest.fixture
def smaller_models(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """timm's models in `SMALL` sizes. What a process has learned of a model it keeps: not beyond these tests."""
    create = timm.create_model

    def small(name: str, **options: Any) -> Any:
        return create(name, **{"embed_dim": 48, "depth": 2, "num_heads": 3, **options})

    monkeypatch.setattr(timm, "create_model", small)
    timm_model.cache_clear()
    yield
    timm_model.cache_clear()


def public_file(path: Path, name: str, **sizes: Any) -> Any:
    """What a release of a model looks like: timm's names and a classifier."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **sizes).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return model


def test_a_domain_is_continued_from_public_weights(
    make_cache: Callable[..., Path], image_tree: Path, colours: Path, tmp_path: Path
) -> None:
    """Pre-training, resumed; k-NN before and after; fine-tuning; and back into timm."""
    public_file(tmp_path / "public.safetensors", "test_vit")
    keys: dict[str, Any] = {
        "student": {"name": "timm:test_vit", **DECODER},
        "init": str(tmp_path / "public.safetensors"),
        "cache": {"path": str(make_cache())},
        "data": {"path": str(image_tree), "workers": 0},
    }
    pretrain.run(pretrain_config(tmp_path / "run", max_steps=3, **keys))
    (tmp_path / "public.safetensors").rename(tmp_path / "moved.safetensors")
    pretrain.run(pretrain_config(tmp_path / "run", **keys))  # goes on without the file
    assert (tmp_path / "run/checkpoints/step-00000006").is_dir()
    before: dict[str, Any] = {"init": str(tmp_path / "moved.safetensors"), "student": {"name": "timm:test_vit"}}
    after: dict[str, Any] = {"init": str(tmp_path / "run")}
    before["student"]["image_size"] = 64
    for subject in (before, after):
        assert 0 <= knn.run(KnnConfig.model_validate({**subject, **sets(colours), "k": 3}))["top1"] <= 1
    tuned = finetune.run(finetune_config(colours, tmp_path / "tuned", max_steps=12, **after))
    assert tuned["top1"] > 0.5
    for init in ("run", "tuned"):
        facts = stages.export.run(ExportConfig(init=tmp_path / init, output=tmp_path / f"{init}_exported"))
        assert facts["cosine"] >= 0.99999
    again = timm.create_model(f"local-dir:{tmp_path / 'run_exported'}", pretrained=True)
    assert type(again).__name__ == "VisionTransformer"
    assert again.pretrained_cfg["architecture"] == "test_vit"


@pytest.mark.parametrize("kind", ["student", "mean", "cls"])
@pytest.mark.parametrize("name", [DINOV3, "timm:eva02_tiny_patch14_336", "timm:vit_base_patch16_siglip_224"])
def test_a_trained_student_goes_back_to_timm(tmp_path: Path, name: str, kind: str) -> None:
    size = 56 if "14" in name else 64
    if "siglip" in name and kind == "cls":
        pytest.skip("it has no class token")
    if kind == "student":
        model: Any = load_encoder(
            None, StudentConfig.model_validate({"name": name, "image_size": size, **SMALL, **DECODER})
        )
    else:
        model = build_classifier(name, 3, pool=kind, image_size=size, **SMALL)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    (tmp_path / "run").mkdir()
    save_weights(model, tmp_path / "run")
    facts = stages.export.run(ExportConfig(init=tmp_path / "run", output=tmp_path / "out"))
    assert facts["cosine"] >= 0.99999
    again: Any = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert tuple(again.pretrained_cfg["mean"]) == model.encoder.named.mean
    images = torch.randn(2, 3, size, size)
    if kind == "student":  # and it starts other stages, as a lone file
        student = StudentConfig.model_validate({"name": name, "image_size": size, **SMALL, **DECODER})
        loaded = load_encoder(tmp_path / "out/model.safetensors", student).eval().encoder
        with torch.inference_mode():
            assert torch.equal(loaded.forward_tokens(images), model.eval().encoder.forward_tokens(images))
    else:
        with torch.inference_mode():
            torch.testing.assert_close(again(model.encoder.own_pixels(images)), model.eval()(images))


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "eva02_tiny_patch14_336", "vit_base_patch16_siglip_224"])
@pytest.mark.usefixtures("smaller_models")
def test_public_weights_in_timms_naming(tmp_path: Path, name: str) -> None:
    """A classifier or a pooling head of the file is left; a norm after the mean is the student's norm."""
    model = public_file(tmp_path / "file.safetensors", name)
    state, spec = read_init(tmp_path / "file.safetensors", f"timm:{name}")
    assert spec is None
    assert not {key.partition(".")[0] for key in state} & {"head", "fc_norm", "attn_pool"}
    final = model.fc_norm if isinstance(model.norm, torch.nn.Identity) else model.norm
    assert torch.equal(state["norm.weight"], final.weight)
    sizes = {"image_size": 56 if "14" in name else 64, **SMALL, **DECODER}
    student = StudentConfig.model_validate({"name": f"timm:{name}", **sizes})
    loaded = load_encoder(tmp_path / "file.safetensors", student).encoder
    assert torch.equal(loaded.state_dict()["blocks.1.norm1.weight"], model.blocks[1].norm1.weight)


def test_weights_from_timms_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """init=timm:NAME names student and weights; without a network one line says what to fetch."""
    create = timm.create_model
    asked = []

    def hub(name: str, pretrained: bool = False, **options: Any) -> Any:
        asked.append((name, pretrained))
        return create(name, **options)

    name = "timm:vit_tiny_patch16_224.augreg_in21k"
    monkeypatch.setattr(timm, "create_model", hub)
    encoder = load_encoder(Path(name), StudentConfig.model_validate({"image_size": 64, **DECODER})).encoder
    assert ("vit_tiny_patch16_224.augreg_in21k", True) in asked
    assert encoder.grid == (4, 4)

    def offline(name: str, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            raise OSError("no route to host")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        CheckpointError, match=r"^'timm:vit_tiny.*can't be fetched \(no route to host\).*give init=FILE"
    ):
        load_encoder(Path(name), None)


def test_a_file_of_another_model_is_named(tmp_path: Path) -> None:
    public_file(tmp_path / "file.safetensors", "test_vit")
    name = "timm:vit_tiny_patch16_224"
    with pytest.raises(CheckpointError, match=r"don't fit this model .*check the student's name and sizes"):
        load_encoder(tmp_path / "file.safetensors", StudentConfig.model_validate({"name": name, "depth": 1}))
    with pytest.raises(CheckpointError, match=r"^init=.*file.safetensors has 16-pixel patches .*choose the student"):
        read_init(tmp_path / "file.safetensors", "timm:vit_base_patch32_224")


@pytest.mark.parametrize("name", ["timm:test_resnet", "timm:mobilenetv3_small_050"])
def test_a_cnn_learns_from_a_cache(
    make_cache: Callable[..., Path], image_tree: Path, colours: Path, tmp_path: Path, name: str
) -> None:
    """Whole views, the teacher's grid; resumed bit for bit; k-NN, probe, fine-tuning; and back into timm."""
    keys: dict[str, Any] = {
        "student": {"name": name},
        "mimic": {"objective": "distil"},
        "cache": {"path": str(make_cache())},
        "data": {"path": str(image_tree), "workers": 0},
        "checkpoint_every": 3,
    }
    pretrain.run(pretrain_config(tmp_path / "run", **keys))
    last, middle = (tmp_path / f"run/checkpoints/step-0000000{step}" for step in (6, 3))
    trained = load_file(last / "model.safetensors")
    if name == "timm:test_resnet":
        (tmp_path / "resumed/checkpoints").mkdir(parents=True)
        middle.rename(tmp_path / "resumed/checkpoints" / middle.name)
        pretrain.run(pretrain_config(tmp_path / "resumed", **keys))
        again = load_file(tmp_path / "resumed/checkpoints" / last.name / "model.safetensors")
        assert all(torch.equal(trained[key], again[key]) for key in trained)
    else:
        with pytest.raises(ConfigError, match="masks_per_sample=2, but objective=distil masks nothing"):
            pretrain.run(pretrain_config(tmp_path / "no", **keys, mask={"masks_per_sample": 2}))
    subject = {"init": str(tmp_path / "run"), **sets(colours)}
    assert knn.run(KnnConfig.model_validate({**subject, "k": 3}))["top1"] > 0.5
    probe = {**subject, "epochs": 10, "batch_size": 8, "blrs": [1.0, 10.0, 100.0]}
    assert linear_probe.run(LinearProbeConfig.model_validate(probe))["top1"] > 0.3
    finetune.run(finetune_config(colours, tmp_path / "tuned", max_steps=4, init=str(tmp_path / "run")))
    for init in ("run", "tuned"):
        facts = stages.export.run(ExportConfig(init=tmp_path / init, output=tmp_path / f"{init}_exported"))
        assert facts["cosine"] >= 0.99999
        exported = timm.create_model(f"local-dir:{tmp_path / f'{init}_exported'}", pretrained=True)
        assert exported.pretrained_cfg["architecture"] == name.removeprefix("timm:")
    assert load_file(tmp_path / "tuned_exported/head.safetensors").keys() == {"weight", "bias"}
    exported_subject = {**subject, "init": str(tmp_path / "run_exported"), "k": 3}
    assert knn.run(KnnConfig.model_validate(exported_subject)) == knn.run(KnnConfig.model_validate({**subject, "k": 3}))
    tuned = {"init": str(tmp_path / "tuned"), "val": sets(colours)["val"]}
    of_export = finetune.evaluate(EvaluateConfig.model_validate({**tuned, "init": str(tmp_path / "tuned_exported")}))
    assert of_export == finetune.evaluate(EvaluateConfig.model_validate(tuned))
    assert set(of_export["lowest"]) == {"red", "green", "blue"}  # it knows their names
    for init in ("run", "tuned"):
        keys = {"init": str(tmp_path / f"{init}_exported"), "max_steps": 1}
        finetune.run(finetune_config(colours, tmp_path / f"{init}_further", **keys))
    plain = timm.create_model(name.removeprefix("timm:"), num_classes=0)
    plain.load_state_dict(load_file(tmp_path / "run_exported/model.safetensors"))  # timm's names, and no others


def test_masks_of_whole_views_are_not_drawn(
    make_cache: Callable[..., Path],
    image_tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def drawn(*_: Any) -> None:
        raise AssertionError("a mask was drawn")

    monkeypatch.setattr("pipeline.data.masks.uniforms_of_each", drawn)
    keys: dict[str, Any] = {
        "student": {"name": "timm:test_resnet"},
        "mimic": {"objective": "distil"},
        "cache": {"path": str(make_cache())},
        "data": {"path": str(image_tree), "workers": 0},
        "max_steps": 1,
    }
    pretrain.run(pretrain_config(tmp_path / "run", **keys, mask={"mask_ratio": 0.75}))
    assert "has no effect" not in caplog.text
    pretrain.run(pretrain_config(tmp_path / "told", **keys, mask={"mask_ratio": 0.5, "focus": "random"}))
    assert "mask.mask_ratio and mask.focus has no effect: objective=distil masks nothing" in caplog.text
    masked = pretrain_config(tmp_path / "masked", **{**keys, "student": MICRO, "mimic": {"objective": "mr_mae"}})
    with pytest.raises(AssertionError, match="a mask was drawn"):
        pretrain.run(masked)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_batch_norms_of_two_processes(sharding: str, colours: Path, tmp_path: Path) -> None:
    """The checkpoint has the statistics of both processes' batches; each evaluates its share with the same ones."""
    keys: dict[str, Any] = {"student": {"name": "timm:test_resnet"}, "max_steps": 1}
    finetune.run(finetune_config(colours, tmp_path / "alone", **keys))
    config = finetune_config(colours, tmp_path / "two", sharding=sharding, **keys)
    words = override_words(config.model_dump(mode="json", exclude_unset=True))
    done = forked_ranks(2, "finetune", *words)
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    assert ("in 2 shares (fsdp)" in done[0].stderr) == (sharding == "fsdp")
    alone, two = (load_file(resolve_checkpoint(tmp_path / name) / "model.safetensors") for name in ("alone", "two"))
    first = "model.conv1.1.running_mean"  # behind the first convolution, whose weights were the same in both
    torch.testing.assert_close(two[first], alone[first], rtol=1e-4, atol=1e-6)
    rows = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    found = finetune.evaluate(EvaluateConfig.model_validate({"init": f"{tmp_path}/two", "val": sets(colours)["val"]}))
    assert rows[-1]["top1"] == found["top1"]


def test_public_weights_of_a_cnn_lose_their_classifier(tmp_path: Path) -> None:
    model = public_file(tmp_path / "file.safetensors", "test_resnet")
    name = StudentConfig.model_validate({"name": "timm:test_resnet", "image_size": 64})
    encoder = load_encoder(tmp_path / "file.safetensors", name).eval().encoder
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model.forward_features(encoder.own_pixels(images)).mean((2, 3))
        torch.testing.assert_close(encoder.forward_tokens(images).mean(1), expected)
    public_file(tmp_path / "other.safetensors", "mobilenetv3_small_050")
    with pytest.raises(CheckpointError, match="don't fit this model"):
        load_encoder(tmp_path / "other.safetensors", name)


def test_what_a_cnn_cannot_do_is_said(tmp_path: Path) -> None:
    model = build_classifier("timm:test_resnet", 2, image_size=64)
    (tmp_path / "run").mkdir()
    save_weights(model, tmp_path / "run")
    with pytest.raises(TeacherError, match="is no transformer"):
        load_teacher(TeacherConfig(spec=f"mrmae:{tmp_path / 'run'}"), torch.device("cpu"))
    for name in ("timm:test_resnet", DINOV3):
        with pytest.raises(ConfigError, match=f"student.name={name} can't attend in windows"):
            build_detector({"name": name, "image_size": 64}, [(1, "cat")])


@pytest.mark.parametrize("name", [DINOV3, "timm:vit_small_patch16_rope_mixed_224"])
def test_a_rotary_student_draws_masks_as_a_teacher(name: str) -> None:
    """Its class token's attention is that of timm's model with these weights."""
    student = StudentConfig.model_validate({"name": name, "image_size": 64, **SMALL, **DECODER})
    encoder: Any = load_encoder(None, student).encoder.eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    views = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    output = build_teacher("mrmae:run", module=encoder)(views)
    twin = timm.create_model(encoder.named.name, num_classes=0, img_size=64, **encoder.changes)
    twin.load_state_dict(encoder.state_dict())
    backbone = TimmBackbone(twin, name, 64, encoder.named.mean, encoder.named.std)
    expected = Teacher(backbone, spec=name, name=name, weights="random")(views)
    assert output.attention is not None
    assert expected.attention is not None
    torch.testing.assert_close(output.attention, expected.attention)
    torch.testing.assert_close(output.tokens, expected.tokens, atol=1e-5, rtol=1e-4)
