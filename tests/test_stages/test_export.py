"""export: what timm and ONNX Runtime make of it, without this project; and a ConvViT's two files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalTokenNotFoundError
from safetensors import safe_open
from torch.nn import functional as F

import pipeline.hub
import stages.export
from pipeline.assembly.students import read_start
from pipeline.configs.models import StudentConfig
from pipeline.errors import CheckpointError, ConfigError, StorageError
from pipeline.models import Classifier, Student, build_classifier, build_student, load_weights, save_weights
from stages.export import ExportConfig

SIZES = {"image_size": [64, 64], "dim": 48, "depth": 2, "num_heads": 3}
DECODER = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2, "objective": "mae"}
TIMM_ALONE = """
import sys, timm, torch
images = torch.load("images.pt", weights_only=True)
for kind in sys.argv[1:]:
    model = timm.create_model("local-dir:" + kind + "/out", pretrained=True).eval()
    with torch.inference_mode():
        tokens = model.fc_norm(model.forward_features(images)[:, model.num_prefix_tokens:])
        torch.save({"tokens": tokens, "output": model(images)}, kind + "/seen.pt")
    config = timm.data.resolve_data_config({}, model=model)
    assert tuple(config["mean"]) == (0.485, 0.456, 0.406) and config["input_size"] == (3, 64, 64), config
assert not {"pipeline", "stages", "cli"} & set(sys.modules)
"""


def checkpoint(folder: Path, kind: str, name: str) -> Student | Classifier:
    torch.manual_seed(0)
    model: Student | Classifier
    if kind == "student":
        model = build_student(name, **SIZES, **DECODER)
    else:
        model = build_classifier(name, 7, pool=kind, **SIZES)
        torch.nn.init.normal_(model.head.weight)
    for parameter in model.parameters():  # norms and tokens at their start would hide a mix-up
        torch.nn.init.normal_(parameter.data, std=0.2) if parameter.ndim == 1 else None
    folder.mkdir(parents=True)
    save_weights(model, folder)
    return model.eval()


def tokens_of(model: Student | Classifier, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return (model if isinstance(model, Classifier) else model.encoder).forward_tokens(images)


def test_wider_mlps_are_exported(tmp_path: Path) -> None:
    """ViT-g's are 48/11 times as wide as its tokens."""
    sizes = {"dim": 44, "depth": 2, "num_heads": 2, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
    model = build_student("mrmae_vit_giant_patch14", objective="mae", image_size=28, **sizes)
    (tmp_path / "run").mkdir()
    save_weights(model, tmp_path / "run")
    assert stages.export.run(ExportConfig(init=tmp_path / "run", output=tmp_path / "out"))["cosine"] >= 0.99999


def test_timm_alone_gives_the_same_features(tmp_path: Path) -> None:
    """Three kinds of models, exported here and all read by one interpreter without this project."""
    images = torch.randn(2, 3, 64, 64)
    torch.save(images, tmp_path / "images.pt")
    models: dict[str, Student | Classifier] = {}
    for kind in ("student", "mean", "cls"):
        models[kind] = checkpoint(tmp_path / kind / "run", kind, "mrmae_vit_tiny_patch16")
        facts = stages.export.run(ExportConfig(init=tmp_path / kind / "run", output=tmp_path / kind / "out"))
        assert facts["cosine"] >= 0.99999
        assert {file.name for file in (tmp_path / kind / "out").iterdir()} == {
            "config.json",
            "model.safetensors",
            "README.md",
        }
    command = [sys.executable, "-c", TIMM_ALONE, *models]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kind, model in models.items():
        seen, ours = torch.load(tmp_path / kind / "seen.pt", weights_only=True), tokens_of(model, images)
        assert float(F.cosine_similarity(seen["tokens"], ours, dim=-1).min()) >= 0.99999, kind
        torch.testing.assert_close(seen["tokens"], ours)
        with torch.inference_mode():  # logits of a classifier; of a student the mean of its tokens: what k-NN reads
            expected = model(images) if isinstance(model, Classifier) else ours.mean(1)
        torch.testing.assert_close(seen["output"], expected)


@pytest.mark.parametrize("kind", ["student", "mean"])
def test_convvit_is_two_files_that_explain_themselves(tmp_path: Path, kind: str) -> None:
    model = checkpoint(tmp_path / "run", kind, "mrmae_convvit_small_patch16")
    facts = stages.export.run(ExportConfig(init=tmp_path / "run", output=tmp_path / "out"))
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert (said["grid"], said["dim"], said["num_classes"]) == ([4, 4], 48, 0 if kind == "student" else 7)
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"]) == said
        names = {name.partition(".")[0] for name in file.keys()}  # noqa: SIM118 - a method of safetensors
    assert {"patch_embed1", "blocks1", "blocks3", "pos_embed"} <= names
    assert names & {"head", "decoder_embed", "mask_token"} == ({"head"} if kind == "mean" else set())
    assert facts["cosine"] >= 0.99999
    if kind == "student":  # and it starts other stages, as a lone file
        from pipeline.assembly.students import load_encoder
        from pipeline.configs.models import StudentConfig

        again = load_encoder(
            tmp_path / "out/model.safetensors", StudentConfig.model_validate({**said["student"], "image_size": 64})
        )
        images = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(tokens_of(again.eval(), images), tokens_of(model, images))


@pytest.mark.parametrize("name", ["mrmae_vit_tiny_patch16", "mrmae_convvit_small_patch16"])
def test_onnx_runtime_gives_the_same_features_at_any_batch_size(tmp_path: Path, name: str) -> None:
    model = checkpoint(tmp_path / "run", "mean", name)
    facts = stages.export.run(ExportConfig(init=tmp_path / "run", output=tmp_path / "out", onnx=True))
    assert facts["onnx_cosine"] >= 0.99999
    session = onnxruntime.InferenceSession(str(tmp_path / "out/model.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = torch.randn(batch, 3, 64, 64)
        tokens, logits = session.run(["tokens", "logits"], {"images": images.numpy()})
        np.testing.assert_allclose(tokens, tokens_of(model, images), atol=1e-4)
        np.testing.assert_allclose(logits, model(images).detach(), atol=1e-4)


def test_what_is_refused_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "run", "student", "mrmae_vit_tiny_patch16")

    def export(**changes: Any) -> None:
        stages.export.run(
            ExportConfig.model_validate({"init": tmp_path / "run", "output": tmp_path / "out", **changes})
        )

    with pytest.raises(CheckpointError, match="does not exist"):
        export(init=tmp_path / "absent")
    with pytest.raises(ConfigError, match="is there already"):
        export(output=tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(stages.export, "_FAITHFUL", 1.1)
        with pytest.raises(CheckpointError, match="the exported features differ"):
            export()
    with monkeypatch.context() as patch:
        patch.setattr(stages.export, "_tokens", lambda model: lambda images: images.new_full((3, 16, 48), torch.nan))
        with pytest.raises(CheckpointError, match="the exported features differ"):
            export()
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"pip install -e '\.\[onnx\]'"):
            export(onnx=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["mrmae_vit_tiny_patch16", "mrmae_convvit_small_patch16"])
@pytest.mark.parametrize("options", [{"decoder": "cross", "predict_share": 0.5, "objective": "mae"},
                                     {"objective": "feature_encoder", "teachers": {"t": 8}}])  # fmt: skip
def test_an_encoder_leaves_its_lean_decoder_behind(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """In an export, and in what a fine-tuning starts from."""
    student = build_student(name, **SIZES, **{**DECODER, **options})
    (tmp_path / "run").mkdir()
    save_weights(student, tmp_path / "run")
    facts = stages.export.run(ExportConfig(init=tmp_path / "run", output=tmp_path / "out"))
    assert facts["cosine"] >= 0.99999
    assert facts["parameters"] == sum(parameter.numel() for parameter in student.encoder.parameters())
    start = read_start(tmp_path / "run", StudentConfig.model_validate({"decoder": "full"}), tmp_path / "tuned")
    assert start.state is not None
    classifier = build_classifier(num_classes=3, **start.encoder)
    report = load_weights(classifier, start.state, strict=False)
    assert {name.partition(".")[0] for name in report.fresh} == {"head", "fc_norm"}


class Hub:
    """What `push` uses of HfApi, with repositories in a folder."""

    root = Path()
    public: ClassVar[set[str]] = set()

    def __init__(self, **_options: Any) -> None:
        pass

    def create_repo(self, repo: str, *, private: bool | None, exist_ok: bool) -> str:
        assert exist_ok
        (self.root / repo).mkdir(parents=True, exist_ok=True)
        return f"https://hub/{repo}"

    def repo_info(self, repo: str) -> Any:
        return SimpleNamespace(private=repo not in self.public)

    def file_exists(self, repo: str, name: str) -> bool:
        return (self.root / repo / name).exists()

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str, ignore_patterns: list[str]
    ) -> None:
        ignore = shutil.ignore_patterns(*ignore_patterns)
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True, ignore=ignore)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pipeline.hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "root", tmp_path / "hub")
    return tmp_path / "hub"


def export_of(run: Path, output: Path, **keys: Any) -> dict[str, Any]:
    return stages.export.run(ExportConfig.model_validate({"init": run, "output": output, **keys}))


def test_what_is_pushed_is_loaded_by_timm_from_the_hub(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint(tmp_path / "run", "mean", "mrmae_vit_tiny_patch16")
    facts = export_of(tmp_path / "run", tmp_path / "out", push="me/flowers")
    assert facts["pushed"] == "https://hub/me/flowers"

    def download(repo_id: str, filename: str, **_options: Any) -> str:
        if not (hub / repo_id / filename).exists():
            raise EntryNotFoundError(filename)
        return str(hub / repo_id / filename)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    twin = timm.create_model("hf-hub:me/flowers", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(twin(images), model(images))
    (hub / "me/flowers/README.md").write_text("edited")
    export_of(tmp_path / "run", tmp_path / "again", push="me/flowers")
    assert (hub / "me/flowers/README.md").read_text() == "edited"


def test_the_card_is_one_of_the_hub_and_names_no_place(student_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/mine"
    shutil.copytree(student_run, run)
    figures = {"knn": {"top1": 0.875, "top5": 1.0}, "linear_probe": {"top1": 0.5, "top5": 0.75, "all": []}}
    (run / "metrics.json").write_text(json.dumps(figures))
    export_of(run, tmp_path / "bare")
    export_of(run, tmp_path / "named", push=None, license="apache-2.0", dataset="colours")
    text = (tmp_path / "named/README.md").read_text()
    card = ModelCard(text)
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "apache-2.0", "timm", "image-feature-extraction",
    )  # fmt: skip
    assert card.data.eval_results is not None
    assert [(result.metric_name, result.metric_value) for result in card.data.eval_results] == [
        ("k-NN, top-1", 87.5), ("k-NN, top-5", 100.0), ("linear probe, top-1", 50.0), ("linear probe, top-5", 75.0),
    ]  # fmt: skip
    assert {result.dataset_name for result in card.data.eval_results} == {"colours"}
    for part in ("| teacher | test_vit (licence: ", "| steps | 6 |", "| k-NN | top-1 87.50 %", "`mrmae pretrain`:"):
        assert part in text, part
    assert 'timm.create_model("hf-hub:OWNER/named", pretrained=True)' in text
    assert str(tmp_path) not in text
    assert str(student_run.parents[1]) not in text
    bare = ModelCard((tmp_path / "bare/README.md").read_text())  # no data set is made up
    assert (bare.data.eval_results, bare.data.license) == (None, "unknown")
    assert "| k-NN | top-1 87.50 %" in bare.text


def failure(status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={"authorization": "Bearer hf_secret"}, request=None)
    return HfHubHTTPError(f"{status} by hf_secret", response=response)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (LocalTokenNotFoundError("Token is required"), ConfigError, "Token is required"),
        (failure(401), ConfigError, r"the hub refuses it \(401\): log in by `hf auth login`"),
        (failure(403), ConfigError, r"the hub refuses it \(403\)"),
        (failure(404), ConfigError, "the hub knows no such owner or repository"),
        (failure(503), StorageError, r"the hub fails \(503\)"),
        (ConnectionError("no route by hf_secret"), StorageError, r"the hub can't be reached \(ConnectionError\)"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_a_failed_push_is_one_line_and_leaves_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], message: str
) -> None:
    checkpoint(tmp_path / "run", "student", "mrmae_vit_tiny_patch16")

    def fail(*_words: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr(Hub, "upload_folder", fail)
    with pytest.raises(kind, match=message) as raised:
        export_of(tmp_path / "run", tmp_path / "out", push="me/mine")
    text = str(raised.value)
    assert f"`hf upload me/mine {tmp_path / 'out'}`" in text
    assert len(text.splitlines()) == 1
    assert "hf_secret" not in text
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_a_private_push_never_goes_to_a_public_repository(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "run", "student", "mrmae_convvit_small_patch16")
    monkeypatch.setattr(Hub, "public", {"me/open"})
    with pytest.raises(ConfigError, match="me/open is public already"):
        export_of(tmp_path / "run", tmp_path / "out", push="me/open", private=True)
    assert not list((hub / "me/open").iterdir())
    export_of(tmp_path / "run", tmp_path / "closed", push="me/closed", private=True)
    text = (hub / "me/closed/README.md").read_text()
    assert ModelCard(text).data.library_name == "mrmae"
    assert "hf download me/closed" in text  # timm has no ConvViT
