"""The house's rules about who imports whom, read from the source: docs/architecture.md says why."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPOSING = {"demo"}  # stages that are made of other stages
# Modules that lie loose in pipeline/, which any wing may use: they import no wing (a test says so)
GROUND = {file.stem for file in (ROOT / "pipeline").glob("*.py")} | {"configs"}
WINGS = {"data", "teachers", "cache", "models", "training", "evaluation", "detection", "segmentation"}
WINGS |= {"assembly"}


# Words that say nothing of what a variable holds, and that no search finds
RIDDLES = {"one", "each", "own", "here", "there", "then", "now", "some", "known", "said", "told", "eye", "seen"}
RIDDLES |= {"mine", "ours", "theirs", "others", "whole", "rest", "few", "thing", "this", "that", "these", "those", "it"}


def imports_of(file: Path) -> set[str]:
    """Dotted names of the project's modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in {"pipeline", "stages", "benchmarks", "cli"}}


def wings_of(file: Path) -> set[str]:
    return {name.split(".")[1] for name in imports_of(file) if name.startswith("pipeline.")} - GROUND


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("file", files("pipeline"), ids=lambda f: str(f.relative_to(ROOT)))
def test_parts_know_no_stage(file: Path) -> None:
    assert not {name for name in imports_of(file) if name.split(".")[0] in {"stages", "benchmarks", "cli"}}


@pytest.mark.parametrize("file", files("stages"), ids=lambda f: f.name)
def test_stages_do_not_import_each_other(file: Path) -> None:
    others = {name for name in imports_of(file) if name.startswith("stages.") and name.split(".")[1] != "configs"}
    assert not others or file.stem in COMPOSING
    assert not {"benchmarks", "cli"} & {name.split(".")[0] for name in imports_of(file)}


@pytest.mark.parametrize("wing", ["data", "models", "teachers", "training", "evaluation"])
def test_wings_that_stand_alone(wing: str) -> None:
    for file in files(f"pipeline/{wing}"):
        assert wings_of(file) <= {wing}, file


CONFIGS = [file for folder in ("pipeline", "stages", "benchmarks") for file in files(f"{folder}/configs")]


def test_the_ground_floor_knows_no_wing() -> None:
    for file in [*(ROOT / "pipeline").glob("*.py"), *files("pipeline/configs")]:
        assert not wings_of(file), file


def test_detection_knows_only_data() -> None:
    """Images and random numbers; the encoder is handed to it."""
    for file in files("pipeline/detection"):
        assert wings_of(file) <= {"detection", "data"}, file


def test_segmentation_knows_only_data() -> None:
    """The patch tokens are handed to it."""
    for file in files("pipeline/segmentation"):
        assert wings_of(file) <= {"segmentation", "data"}, file


def test_the_cache_knows_no_other_wing() -> None:
    for file in files("pipeline/cache"):
        names = {name.split(".")[1] for name in imports_of(file)}
        assert names <= {"cache", "cards", "configs", "errors", "files", "forking", "locations", "locks"}, file


def test_wings_meet_in_assembly_alone() -> None:
    for file in files("pipeline"):
        wings = wings_of(file)
        if not file.is_relative_to(ROOT / "pipeline" / "assembly"):
            assert "assembly" not in wings, file
            assert "cache" not in wings or file.is_relative_to(ROOT / "pipeline" / "cache"), file


def test_one_place_writes_tensors() -> None:
    """safetensors' own function leaves files that only their owner reads."""
    found = [file for file in files("pipeline") + files("stages") if "save_file" in file.read_text()]
    assert [file.name for file in found] == ["tensor_files.py"]


def test_a_stage_that_loads_or_joins_others_owns_what_it_opens() -> None:
    """Without `@stage` an error in it may leave workers, or processes that wait for this one, behind."""
    opening = {"pipeline.data.loader", "pipeline.data.labelled"}
    opening |= {"pipeline.assembly.extraction", "pipeline.assembly.frozen_features"}
    opening |= {"pipeline.processes.processes", "pipeline.detection.dataset"}
    found = set()
    for file in files("stages"):
        if any(name.startswith(tuple(opening)) for name in imports_of(file)):
            found.add(file.stem)
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.FunctionDef) and node.name in {"run", "evaluate"}:
                    assert "stage" in map(ast.unparse, node.decorator_list), f"{file}: {node.name}"
    assert {"pretrain", "finetune", "detect", "knn", "extract_teacher_features"} <= found


@pytest.mark.parametrize("folder", ["pipeline", "stages", "benchmarks", "."])
def test_variables_are_called_by_what_they_hold(folder: str) -> None:
    found = set()
    for file in [ROOT / "cli.py"] if folder == "." else files(folder):
        for node in ast.walk(ast.parse(file.read_text())):
            name = node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else ""
            name = node.arg if isinstance(node, ast.arg) else name
            if name in RIDDLES:
                found.add(f"{file.relative_to(ROOT)}: {name}")
    assert not found


def test_every_wing_is_known_here() -> None:
    assert {folder.name for folder in (ROOT / "pipeline").iterdir() if (folder / "__init__.py").exists()} == WINGS | {
        "configs"
    }


def test_cli_starts_light() -> None:
    """`--help` answers at once: no heavy library comes in with the cli."""
    code = "import cli, sys; print(*{'torch', 'timm', 'pydantic', 'omegaconf', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_configs_import_nothing_heavy() -> None:
    """So a config is checked, and its keys are shown, without the seconds that torch needs."""
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in CONFIGS]
    heavy = "print(*{'torch', 'timm', 'numpy', 'PIL', 'accelerate'} & set(sys.modules))"
    code = f"import sys, {', '.join(modules)}; {heavy}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_help_answers_in_half_a_second() -> None:
    def seconds() -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "cli", "--help"], cwd=ROOT, capture_output=True, check=True)
        return time.perf_counter() - began

    assert min(seconds() for _ in range(3)) < 0.5  # the best of three: other work may share the machine
