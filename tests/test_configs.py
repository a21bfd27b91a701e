"""Every file in configs/ loads in each of its sections, and the tiny twins really run."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from omegaconf import OmegaConf
from PIL import Image

import cli
from pipeline.config import Config, load_config
from stages.ablate import AblateConfig
from stages.detect import DetectConfig
from stages.extract_teacher_features import ExtractConfig
from stages.finetune import FinetuneConfig
from stages.knn import KnnConfig
from stages.linear_probe import LinearProbeConfig
from stages.pretrain import PretrainConfig
from tests.pictures import smooth_picture

FOLDER = Path(__file__).parents[1] / "configs"
CLASSES: dict[str, type[Config]] = {
    "ablate": AblateConfig,
    "extract-teacher-features": ExtractConfig,
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "detect": DetectConfig,
    "knn": KnnConfig,
    "linear-probe": LinearProbeConfig,
}
FILES = sorted(FOLDER.glob("*.yaml"))
SECTIONS = [(file, section) for file in FILES for section in OmegaConf.load(file) if section in CLASSES]


@pytest.mark.parametrize(("file", "section"), SECTIONS, ids=lambda value: getattr(value, "stem", value))
def test_every_section_is_valid(file: Path, section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGENET", "/images")
    monkeypatch.setenv("COCO", "/coco")
    load_config(CLASSES[section], file, section=section)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_has_its_commands_on_top_and_a_tiny_twin(file: Path) -> None:
    head = file.read_text().partition("\n\n")[0]
    assert "mrmae" in head or "-m cli" in head
    twin = file.stem.removesuffix("_tiny") + "_tiny"
    assert (FOLDER / f"{twin}.yaml").is_file()


def run(command: str, config: str) -> None:
    result = CliRunner().invoke(cli.main, [command, "--config", str(FOLDER / config)])
    assert result.exit_code == 0, result.output


def test_the_tiny_imagenet_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        for split in ("train", "val"):
            file = tmp_path / split / f"class{number % 2}" / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture: Image.Image = smooth_picture(number, 90, 80)
            picture.save(file)
    monkeypatch.setenv("IMAGENET", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for command in ("extract-teacher-features", "pretrain", "finetune"):
        run(command, "imagenet_tiny.yaml")


@pytest.mark.parametrize("file", ["imagenette_tiny.yaml", "imagenette_128_tiny.yaml"])
def test_the_tiny_imagenette_chains(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.setenv("MRMAE_DATA", str(real_data))
    monkeypatch.chdir(tmp_path)
    for command in (name for name in OmegaConf.load(FOLDER / file) if name in CLASSES):
        run(command, file)


@pytest.mark.usefixtures("forked_commands")
def test_the_tiny_ablation(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRMAE_DATA", str(real_data))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))  # its processes start where we are
    monkeypatch.chdir(tmp_path)
    run("ablate", "ablation_imagenette_tiny.yaml")
    assert "| mr_mae |" in (tmp_path / "runs/ablation_tiny/table.md").read_text()


@pytest.mark.usefixtures("forked_commands")
def test_the_tiny_pair_of_teachers(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRMAE_DATA", str(real_data))
    monkeypatch.chdir(tmp_path)
    for command in ("extract-teacher-features", "ablate"):
        run(command, "two_teachers_imagenette_tiny.yaml")
    assert "| PHI-S |" in (tmp_path / "runs/two_teachers_tiny/table.md").read_text()


def test_the_tiny_evidence_has_all_rows() -> None:
    whole, tiny = (OmegaConf.load(FOLDER / f"evidence_gpu{twin}.yaml") for twin in ("", "_tiny"))
    assert whole.ablate.variants == tiny.ablate.variants
    assert list(whole.ablate.caches) == list(tiny.ablate.caches)
    assert len(whole.ablate.variants) == 14


@pytest.mark.slow  # 28 commands
@pytest.mark.usefixtures("forked_commands")
def test_the_tiny_evidence(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRMAE_DATA", str(real_data))
    monkeypatch.chdir(tmp_path)
    run("ablate", "evidence_gpu_tiny.yaml")
    table = (tmp_path / "runs/evidence_tiny/table.md").read_text()
    assert "to come" not in table
    for name in OmegaConf.load(FOLDER / "evidence_gpu_tiny.yaml").ablate.variants:
        assert f"| {name} |" in table
    run("bootstrap", "evidence_gpu_tiny.yaml")
    assert "| 2 |" in (tmp_path / "runs/evidence_tiny_bootstrap/table.md").read_text()
