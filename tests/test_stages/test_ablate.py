"""Variants × seeds: the commands are run, the table is made, and what is done is not done again."""

import csv
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import xxhash
from omegaconf import OmegaConf

from pipeline.assembly.chains import chain as chain_of_commands
from pipeline.assembly.chains.ablation import Cost, Curve, Row, read_cost, write_tables
from pipeline.assembly.chains.jobs import environments, run_jobs
from pipeline.config import load_config
from pipeline.errors import ConfigError, PipelineError
from pipeline.training.interruption import Interrupted, Interruption
from stages import ablate
from stages.ablate import AblateConfig
from tests.test_stages.conftest import MICRO, PLAIN, TEACHER


def write_config(folder: Path, images: Path, **changes: object) -> Path:
    data = {"path": str(images), "workers": 0}
    labelled = {"data": data, "val": data, "crop": 1.0}
    chain = {
        "extract-teacher-features": {
            "data": data, "teacher": TEACHER, "views": {"image_size": 64}, "cache": {"path": "unused"},
        },
        "pretrain": {
            "data": data, "cache": {"path": "unused"}, "student": MICRO, "views": {"image_size": 64},
            "optim": {"lr": 1e-3, "warmup_epochs": 0}, "batch_size": 8, "max_steps": 2, "output": "unused",
            "tensorboard": False,
        },
        "knn": {**labelled, "init": "unused", "k": 3},
        "linear-probe": {**labelled, "init": "unused", "epochs": 2, "batch_size": 8},
        "finetune": {
            **labelled, "init": "unused", "output": "unused", "augment": PLAIN, "drop_path": 0.0, "batch_size": 8,
            "optim": {"lr": 1e-3, "warmup_epochs": 0}, "max_steps": 2, "tensorboard": False,
        },
        "ablate": {
            "output": str(folder / "ablation"), "seeds": [0, 1], "measures": ["knn"], "caches": {"one": []},
            "variants": {
                "untrained": {"student": [f"student={json.dumps(MICRO)}"]},
                "mr_mae": {"group": "objective", "cache": "one", "pretrain": ["mimic.mimic_weight=2"]},
            },
        } | changes,
    }  # fmt: skip
    file = folder / "chain.yaml"
    OmegaConf.save(OmegaConf.create(chain), file)
    return file


def run_command(arguments: list[str], log: Path) -> None:
    with Interruption() as interruption:
        chain_of_commands._command(arguments, log, interruption, {})


@pytest.mark.usefixtures("forked_commands")
def test_a_table_of_variants_and_seeds(image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, said = write_config(tmp_path, image_tree), list[str]()
    config = load_config(AblateConfig, file, section="ablate")
    table = ablate.run(config, file, said.append)
    out = tmp_path / "ablation"
    runs = ["untrained, seed {}: knn", "mr_mae, seed {}: pretrain", "mr_mae, seed {}: knn"]
    assert said == ["cache one: extract-teacher-features", *(run.format(seed) for seed in (0, 1) for run in runs)]
    rows = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    assert [(row["variant"], row["seed"]) for row in rows] == [
        ("untrained", "0"), ("untrained", "1"), ("mr_mae", "0"), ("mr_mae", "1"),
    ]  # fmt: skip
    measured = json.loads((out / "runs/mr_mae/seed1/metrics.json").read_text())["knn"]["top1"]
    assert float(rows[3]["knn"]) == measured
    mean = (float(rows[2]["knn"]) + float(rows[3]["knn"])) / 2
    assert f"| mr_mae | {mean:.3f} ±" in table
    assert (out / "bars.png").stat().st_size > 5000
    kept = OmegaConf.load(out / "runs/mr_mae/seed1/pretrained/config.yaml")
    assert (kept.seed, kept.mimic.mimic_weight) == (1, 2)
    said.clear()
    written: list[Path] = []
    write = ablate.write_tables
    with monkeypatch.context() as patch:
        patch.setattr(ablate, "write_tables", lambda *given: (written.append(given[0]), write(*given))[1])
        assert ablate.run(config, file, said.append) == table
    assert said == []
    assert written == [out]  # once, not row by row
    assert "untrained" not in ablate.run(config.model_copy(update={"groups": ["objective"]}), file, said.append)
    with pytest.raises(ConfigError, match=r"groups=\['target'\]: the variants have , objective"):
        load_config(AblateConfig, file, ["groups=[target]"], section="ablate")
    write_config(tmp_path, image_tree, caches={"one": ["views.count=2"]})
    with pytest.raises(ConfigError, match="holds extract-teacher-features with other keys than now"):
        ablate.run(load_config(AblateConfig, file, section="ablate"), file, said.append)


@pytest.mark.usefixtures("forked_commands")
def test_every_measure_ends_in_the_table(image_tree: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path, image_tree, seeds=[3], measures=["knn", "linear-probe", "finetune"])
    table = ablate.run(load_config(AblateConfig, file, section="ablate"), file)
    assert table.splitlines()[2] == "| | knn | linear-probe | finetune | minutes a seed |"
    run = tmp_path / "ablation/runs/mr_mae/seed3"
    records = json.loads((run / "metrics.json").read_text())
    last = [json.loads(line) for line in (run / "finetuned/metrics.jsonl").read_text().splitlines()][-1]
    figures = (records["knn"]["top1"], records["linear_probe"]["top1"], last["top1"])
    assert f"| mr_mae | {' | '.join(f'{figure:.3f}' for figure in figures)} |" in table
    assert table.startswith("Top-1, one seed: no spread was measured.")


@pytest.mark.usefixtures("forked_commands")
def test_a_further_data_set_has_columns_of_its_own(image_tree: Path, tmp_path: Path) -> None:
    small = f"{{path: {image_tree}, workers: 0, limit: 8}}"
    changes = {"seeds": [3], "measures": ["knn", "finetune"], "transfer": {"few": [f"data={small}", f"val={small}"]}}
    file, said = write_config(tmp_path, image_tree, **changes), list[str]()
    table = ablate.run(load_config(AblateConfig, file, section="ablate"), file, said.append)
    assert table.splitlines()[2] == "| | knn | finetune | knn, few | minutes a seed |"
    run = tmp_path / "ablation/runs/mr_mae/seed3"
    records = [json.loads((folder / "metrics.json").read_text())["knn"] for folder in (run, run / "few")]
    assert "limit: 8" in (run / "few/commands.log").read_text()
    row = next(line for line in table.splitlines() if line.startswith("| mr_mae")).split(" | ")
    assert [row[1], row[3]] == [f"{record['top1']:.3f}" for record in records]
    assert "mr_mae, seed 3, few: knn" in said
    said.clear()
    assert ablate.run(load_config(AblateConfig, file, section="ablate"), file, said.append) == table
    assert said == []


def test_a_command_that_is_stopped_may_save_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ctrl-C or SIGTERM waits for the command, which needs a second here."""
    child = tmp_path / "child.py"
    child.write_text(
        "import signal, sys, time, pathlib\n"
        "def save(*_):\n    time.sleep(1)\n    pathlib.Path('saved').write_text('')\n    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, save)\npathlib.Path('ready').write_text('')\ntime.sleep(60)\n"
    )
    monkeypatch.chdir(tmp_path)
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **keys: popen([command[0], str(child)], **keys))

    def stop() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(Interrupted, match="pretrain was stopped"):
        run_command(["pretrain"], tmp_path / "log")
    assert (tmp_path / "saved").exists()


def test_a_cli_of_the_working_folder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cli", "pipeline", "stages"):
        (tmp_path / f"{name}.py").write_text("open('started', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(PipelineError, match=r"knn failed: error: .*missing\.yaml"):
        run_command(["knn", "--config", "missing.yaml"], tmp_path / "log")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("content", ['{"knn": {', "[1]", ""])
def test_a_torn_record_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "done.json").write_text(content)
    with pytest.raises(PipelineError, match=r"done\.json is damaged .* remove it, and what it stood for runs again"):
        chain_of_commands._read(tmp_path / "done.json")


@pytest.mark.usefixtures("forked_commands")
def test_a_command_that_fails_is_named_with_its_log(image_tree: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path, image_tree, caches={"one": ["views.count=0"]})
    with pytest.raises(
        PipelineError, match=r"extract-teacher-features failed: error: .*views\.count=0.*logs/one/commands\.log"
    ):
        ablate.run(load_config(AblateConfig, file, section="ablate"), file)


def test_a_cache_that_is_not_listed(image_tree: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path, image_tree, caches={"other": []})
    with pytest.raises(ConfigError, match=r"variants\.mr_mae\.cache=one: caches has other"):
        load_config(AblateConfig, file, section="ablate")


@pytest.mark.parametrize("lost", ["knn", "pretrain", "extract-teacher-features"])
def test_a_section_that_is_missing_is_said_before_anything_runs(
    image_tree: Path, tmp_path: Path, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_config(tmp_path, image_tree)
    config = load_config(AblateConfig, file, section="ablate")
    chain = OmegaConf.load(file)
    del chain[lost]
    OmegaConf.save(chain, file)
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(ConfigError, match=f"has no section '{lost}': add it"):
        ablate.run(config, file)
    chain[lost] = {"data": {"path": "${oc.env:NOT_SET_ANYWHERE}"}}
    OmegaConf.save(chain, file)
    with pytest.raises(ConfigError, match=f"section '{lost}': .*NOT_SET_ANYWHERE"):
        ablate.run(config, file)


@pytest.mark.usefixtures("forked_commands")
def test_jobs_share_the_machine_and_leave_equal_runs(
    image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Side by side as one after the other; k-NN on the way gives the curves and the ranking."""
    labelled = {"path": str(image_tree), "workers": 0}
    file = write_config(tmp_path, image_tree, seeds=[1])
    knn = {"data": labelled, "val": labelled, "crop": 1.0, "k": 3, "every": 0.5}
    keys = {"knn": knn, "max_steps": 4, "log_every": 1}
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(file), {"pretrain": keys}), file)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # another number gives other last bits
    tables, weights = list[list[str]](), list[bytes]()
    for jobs in (1, 2):
        config = load_config(AblateConfig, file, [f"output={tmp_path}/jobs{jobs}", f"jobs={jobs}"], section="ablate")
        lines = ablate.run(config, file).splitlines()
        tables.append([line.split(" | ")[1] for line in lines if line.startswith(("| untrained", "| mr_mae"))])
        run = tmp_path / f"jobs{jobs}/runs/mr_mae/seed1/pretrained"
        weights.append((run / "checkpoints/step-00000004/model.safetensors").read_bytes())
        assert (tmp_path / f"jobs{jobs}/curves.png").stat().st_size > 5000
        assert "| 1. mr_mae |" in (tmp_path / f"jobs{jobs}/table.md").read_text()
    assert tables[0] == tables[1]
    assert len(tables[0]) == 2
    assert weights[0] == weights[1]


def test_gpus_take_jobs_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5e")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [env["CUDA_VISIBLE_DEVICES"] for env in environments(3)] == ["4", "GPU-5e", "4"]
    assert "OMP_NUM_THREADS" not in environments(3)[0]  # asked for by hand
    assert environments(1) == [{}]
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert environments(3)[2]["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 3))


def test_after_a_failure_no_job_begins() -> None:
    begun = list[int]()

    def task(number: int, _env: Mapping[str, str]) -> int:
        begun.append(number)
        if number == 1:
            raise PipelineError("the second fails")
        return number

    results = list[tuple[int, int]]()
    with pytest.raises(PipelineError, match="the second fails"):
        results.extend(run_jobs([partial(task, number) for number in range(50)], jobs=1))
    assert begun == [0, 1]
    assert results in ([(0, 0)], [])


@pytest.mark.usefixtures("forked_commands")
def test_a_budget_gives_every_variant_the_same_steps(image_tree: Path, tmp_path: Path) -> None:
    variants = {
        "mr_mae": {"cache": "one", "pretrain": []},
        "other": {"cache": "one", "pretrain": ["mimic.mimic_weight=2", "max_steps=1"]},
    }
    file = write_config(tmp_path, image_tree, variants=variants, seeds=[0])
    with pytest.raises(ConfigError, match=r"minutes=0\.01 leaves no time to train.*: give \d+ or more"):
        ablate.run(load_config(AblateConfig, file, ["minutes=0.01"], section="ablate"), file)
    config = load_config(AblateConfig, file, ["minutes=1"], section="ablate")
    ablate.run(config, file)
    out = tmp_path / "ablation"
    steps = json.loads((out / "steps.json").read_text())["steps"]
    for name in variants:
        (checkpoint,) = (out / f"runs/{name}/seed0/pretrained/checkpoints").glob("step-*")
        assert int(checkpoint.name.split("-")[1]) == steps
    with pytest.raises(ConfigError, match="holds runs for minutes=1: give that, or another output"):
        ablate.run(load_config(AblateConfig, file, ["minutes=2"], section="ablate"), file)


def test_a_folder_goes_on_where_the_data_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that was copied to another machine: what is done is done, though the environment differs."""
    file = tmp_path / "chain.yaml"
    file.write_text("root: ${oc.env:SOME_ROOT,/data}\nknn: {data: {path: '${root}/train'}, k: 3}\n")
    (tmp_path / "metrics.json").write_text('{"knn": {"top1": 0.5}}')
    calls = list[list[str]]()
    monkeypatch.setattr(chain_of_commands, "_command", lambda arguments, *_: calls.append(arguments))

    def run() -> float | None:
        with chain_of_commands.Chain(file) as chain:
            return chain.run("knn", ["seed=1"], tmp_path, "k-NN", tmp_path).top1

    assert (run(), len(calls)) == (0.5, 1)
    monkeypatch.setenv("SOME_ROOT", "/elsewhere")
    assert (run(), len(calls)) == (0.5, 1)
    file.write_text(file.read_text().replace("k: 3", "k: 4"))
    with pytest.raises(ConfigError, match="holds knn with other keys than now"):
        run()


def test_the_seconds_of_a_step_are_those_of_all_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after 5 s, failed after 2, done after 4: 11; a step that asks for something else begins at 0."""
    file = tmp_path / "chain.yaml"
    file.write_text("pretrain: {epochs: 1}\n")
    clock = [0.0]
    ends: list[tuple[float, Exception | None]] = [
        (5, Interrupted("stopped")), (2, PipelineError("failed")), (4, None), (3, Interrupted("stopped")), (6, None),
    ]  # fmt: skip

    def command(*_: object) -> None:
        seconds, error = ends.pop(0)
        clock[0] += seconds
        if error is not None:
            raise error

    monkeypatch.setattr(chain_of_commands, "_command", command)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def run(folder: str, key: str) -> float:
        with chain_of_commands.Chain(file) as chain:
            return chain.run("pretrain", [key], tmp_path / folder, "a").seconds

    for error in (Interrupted, PipelineError):
        with pytest.raises(error):
            run("one", "seed=1")
    assert json.loads((tmp_path / "one/done.json").read_text()).keys() == {"attempts"}
    assert run("one", "seed=1") == run("one", "seed=1") == 11
    assert json.loads((tmp_path / "one/done.json").read_text()).keys() == {"pretrain"}
    with pytest.raises(Interrupted):
        run("other", "seed=1")
    assert run("other", "seed=2") == 6


def test_a_cost_counts_knn_on_the_way(tmp_path: Path) -> None:
    """Rows of a run of 8 images a step, four steps an epoch, k-NN after every two epochs."""
    (tmp_path / "config.yaml").write_text("batch_size: 8\nknn: {every: 2}\n")
    rows = [
        {"step": 4, "epoch": 1.0, "images_per_s": 1.0},
        {"step": 8, "knn_top1": 0.1, "evaluation_s": 9.0},
        {"step": 20, "epoch": 5.0, "images_per_s": 16.0},
        {"step": 20, "knn_top1": 0.2, "evaluation_s": 4.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cost = read_cost(tmp_path)
    assert cost == (0.5, 4.0, 8)
    assert cost.rate == 0.5 + 4.0 / 8
    assert [cost.knns(steps) for steps in (8, 9, 20)] == [4.0, 8.0, 12.0]


@pytest.mark.parametrize(("jobs", "timed"), [(1, 2), (2, 2), (3, 4), (8, 4)])
def test_steps_are_timed_under_the_load_of_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int, timed: int
) -> None:
    """Two variants and two seeds make four runs; k-NN on the way takes its share of the time."""
    file = tmp_path / "chain.yaml"
    file.write_text("pretrain: {}\nknn: {}\n")
    variants = {name: {"pretrain": []} for name in ("a", "b")}
    config = AblateConfig.model_validate(
        {"output": str(tmp_path / "out"), "measures": ["knn"], "caches": {}, "variants": variants, "jobs": jobs}
    )
    folders = set[Path]()

    def run_one(_self: object, _name: str, _seed: int, folder: Path, *_: object) -> ablate.Found:
        folders.add(folder)
        return ablate.Found({}, 50.0, None, True)

    monkeypatch.setattr(ablate._Ablation, "_run_one", run_one)
    monkeypatch.setattr(ablate, "read_cost", lambda _: Cost(0.5, 8.0, 10))
    ablation = ablate._Ablation(config, chain_of_commands.Chain(file))
    began = time.monotonic()
    steps = ablation._fitting_steps(2000.0, began)
    assert len(folders) == timed
    turns = -(-4 // jobs)
    # Starts take 50 - 20 x 0.5 - 2 x 8 = 24 s. Each step costs 0.5 + 8 / 10, and the last k-NN 8 more.
    assert steps == pytest.approx((2000 * 0.95 / turns - 24 - 8) / 1.3, abs=3)


def test_records_of_before_count_on_their_machine(tmp_path: Path) -> None:
    """Digests of done.json held the environment's values once."""
    file = tmp_path / "chain.yaml"
    file.write_text("root: ${oc.env:SOME_ROOT,/data}\nknn: {data: {path: '${root}/train'}}\n")
    former = xxhash.xxh3_128_hexdigest(b"data:\n  path: /data/train\nseed: 1\n")
    (tmp_path / "done.json").write_text(json.dumps({"knn": {"what": former, "seconds": 2.0, "top1": 0.25}}))
    with chain_of_commands.Chain(file) as chain:
        assert chain.run("knn", ["seed=1"], tmp_path, "k-NN", tmp_path) == (2.0, 0.25)


def test_variants_are_ranked_at_equal_steps_and_at_equal_seconds(tmp_path: Path) -> None:
    """The slower one is better at the last step, and behind when the faster one has ended."""
    steps = np.array([10.0, 20.0])
    slow = Curve(steps, np.array([4.0, 8.0]), np.array([0.2, 0.6]))
    fast = Curve(steps, np.array([2.5, 5.0]), np.array([0.3, 0.5]))
    late = Curve(steps, np.array([6.0, 12.0]), np.array([0.1, 0.4]))  # it says nothing of 5 seconds
    rows = {
        name: Row("", {"knn": {0: float(curve.top1[-1])}}, {0: 1.0}, {0: curve})
        for name, curve in (("slow", slow), ("fast", fast), ("late", late))
    }
    lines = write_tables(tmp_path, rows, [0], ["knn"]).splitlines()
    assert "| rank by steps | k-NN at the last step | k-NN after 5 s of training | rank by seconds |" in lines
    assert lines[-3:] == [
        "| 1. slow | 0.600 | 0.300 | 2 |",
        "| 2. fast | 0.500 | 0.500 | 1 |",
        "| 3. late | 0.400 | – | – |",
    ]
