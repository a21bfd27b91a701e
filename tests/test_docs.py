"""What the documents say: links lead somewhere, and the commands they show exist and take the keys they are given."""

import re
import shlex
import typing
from pathlib import Path

import click
import pytest

import cli
from pipeline.config import Config
from stages.ablate import AblateConfig
from stages.benchmark_cache import BenchmarkCacheConfig
from stages.benchmark_decode import BenchmarkDecodeConfig
from stages.benchmark_detector import BenchmarkDetectorConfig
from stages.benchmark_extract import BenchmarkExtractConfig
from stages.benchmark_pretrain import BenchmarkPretrainConfig
from stages.benchmark_student import BenchmarkStudentConfig
from stages.demo import DemoConfig
from stages.detect import DetectConfig
from stages.export import ExportConfig
from stages.extract_teacher_features import ExtractConfig
from stages.finetune import FinetuneConfig
from stages.knn import KnnConfig
from stages.linear_probe import LinearProbeConfig
from stages.plan import PlanConfig
from stages.pretrain import PretrainConfig
from stages.visualize import VisualizeConfig

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
CONFIGS: dict[str, type[Config]] = {
    "extract-teacher-features": ExtractConfig,
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "detect": DetectConfig,
    "knn": KnnConfig,
    "linear-probe": LinearProbeConfig,
    "visualize": VisualizeConfig,
    "export": ExportConfig,
    "demo": DemoConfig,
    "plan": PlanConfig,
    "ablate": AblateConfig,
    "benchmark cache": BenchmarkCacheConfig,
    "benchmark decode": BenchmarkDecodeConfig,
    "benchmark extract": BenchmarkExtractConfig,
    "benchmark pretrain": BenchmarkPretrainConfig,
    "benchmark student": BenchmarkStudentConfig,
    "benchmark detector": BenchmarkDetectorConfig,
}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_links_resolve(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def shown_commands() -> list[tuple[str, str]]:
    """(document, command line) of every mrmae call in a code block."""
    found = []
    for document in DOCUMENTS:
        # Every fenced block, whatever its language: matched with its own end, so that none is taken inside out.
        for language, block in re.findall(
            r"^```(\w*)\n(.*?)^```", document.read_text(), flags=re.DOTALL | re.MULTILINE
        ):
            lines = block.replace("\\\n", " ").splitlines() if language in ("", "sh") else []
            found += [(document.name, line) for line in lines if re.search(r"\bmrmae |-m cli ", line)]
    return found


@pytest.mark.parametrize(("document", "line"), shown_commands())
def test_commands_exist_and_know_their_keys(document: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    words = words[(words.index("mrmae") if "mrmae" in words else words.index("cli")) + 1 :]
    name = " ".join(words[:2]) if words[0] == "benchmark" else words[0]
    assert cli.main.get_command(click.Context(cli.main), words[0]), f"{document}: no such command"
    keys = [word.partition("=")[0] for word in words[1:] if re.match(r"[a-z_.]+=", word)]
    config = CONFIGS.get(name)
    assert config is not None or not keys
    for key in keys:
        assert config is not None
        assert knows(config, key.split(".")), f"{document}: {words[0]} has no key {key}"


def knows(config: type[Config], parts: list[str]) -> bool:
    """Whether a.b.c is a key of the config; names of the user's own, as in `caches.NAME.path`, may be anything."""
    if parts[0] not in config.model_fields:
        return False
    section, rest = section_of(config, parts[0]), parts[1:]
    if typing.get_origin(config.model_fields[parts[0]].annotation) is dict:
        rest = rest[1:]
    return not rest or section is None or knows(section, rest)


def section_of(config: type[Config], name: str) -> type[Config] | None:
    """The config class that a field holds, if it holds one."""
    annotation = config.model_fields[name].annotation
    candidates = (annotation, *typing.get_args(annotation))
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, Config)), None)
