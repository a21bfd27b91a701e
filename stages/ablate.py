"""Run variants × seeds, and tabulate them.

    mrmae ablate --config configs/ablation_imagenette.yaml

Reads the sections of the commands in --config, and `ablate` beside them. Each run is the plain commands, in processes
of their own, with keys that anybody could type:

    mrmae pretrain --config FILE cache.path=... output=... seed=... (and the variant's keys)
    mrmae knn --config FILE init=... seed=... output=... (linear-probe and finetune alike)

Caches that differ (views, quantiser) are extracted first, each once. Writes caches, runs with their commands.log, and
table.md, table.csv, bars.png to ablate.output. Costs a pre-training and its measures for each variant and seed. Started
again, it skips what is done and goes on where a run stopped.
"""

import csv
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import matplotlib
import xxhash
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, model_validator

from pipeline.config import Config, PathField
from pipeline.errors import ConfigError, PipelineError
from pipeline.files import write_text
from pipeline.training.interruption import Interrupted, Interruption

matplotlib.use("Agg")

INTERRUPTED = 130  # exit code of a command that was stopped and has saved
_STOPPING = "stopping as soon as the command in hand has saved; ctrl-C again ends it at once"

Measure = Literal["knn", "linear-probe", "finetune"]


class VariantConfig(Config):
    """What one row of the table changes."""

    group: str = ""  # rows of one group are compared with each other
    cache: str | None = None  # a name in `caches`; null: none, for an untrained student or plain MAE
    pretrain: list[str] | None = None  # keys for `pretrain`; null: no pre-training
    student: list[str] = Field(default_factory=list)  # keys for an untrained student, in place of init


class AblateConfig(Config):
    """Everything `ablate` takes."""

    output: PathField
    seeds: list[int] = Field(default=[0, 1], min_length=1)
    measures: list[Measure] = Field(default=["knn", "linear-probe", "finetune"], min_length=1)
    caches: dict[str, list[str]]  # name → keys for `extract-teacher-features`
    variants: dict[str, VariantConfig]

    @model_validator(mode="after")
    def _known_caches(self) -> "AblateConfig":
        for name, variant in self.variants.items():
            if variant.cache is not None and variant.cache not in self.caches:
                raise ValueError(f"variants.{name}.cache={variant.cache}: caches has {', '.join(self.caches)}")
        return self


@dataclass
class Row:
    """A variant's figures: measure → one value a seed, and the wall time of each seed's commands in seconds."""

    group: str
    figures: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def summary(self, measure: str) -> tuple[float, float | None] | None:
        """Mean, and sample standard deviation, which one value doesn't have."""
        values = self.figures.get(measure)
        if not values:
            return None
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def run(config: AblateConfig, file: Path, say: Callable[[str], None] = lambda line: None) -> str:
    """Run everything that isn't done; returns the table.

    Raises:
        ConfigError: the file lacks a section that will be needed.
        PipelineError: a command failed; its log is named. Interrupted: it was stopped.
    """
    _check_sections(config, file)
    for name in dict.fromkeys(variant.cache for variant in config.variants.values() if variant.cache is not None):
        _extract(config, file, name, say)
    rows: dict[str, Row] = {name: Row(variant.group) for name, variant in config.variants.items()}
    for seed in config.seeds:  # seed by seed: a whole table comes early, its spread later
        for name in config.variants:
            figures, seconds = _run_one(config, file, name, seed, say)
            for measure, value in figures.items():
                rows[name].figures.setdefault(measure, []).append(value)
            rows[name].seconds.append(seconds)
    return _write(config, rows)


def _check_sections(config: AblateConfig, file: Path) -> None:
    """Before hours of work: the file has a section for each command that will run, and all of it resolves."""
    steps: list[str] = [*config.measures]
    if any(variant.pretrain is not None for variant in config.variants.values()):
        steps.append("pretrain")
    if any(variant.cache is not None for variant in config.variants.values()):
        steps.append("extract-teacher-features")
    root = cast(DictConfig, OmegaConf.load(file))
    for step in steps:
        if not isinstance(root.get(step), DictConfig):
            raise ConfigError(f"--config {file} has no section '{step}': add it, or leave it out of ablate.measures")
        try:
            OmegaConf.to_container(root[step], resolve=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"--config {file}, section '{step}': {str(error).splitlines()[0]}") from error


def _extract(config: AblateConfig, file: Path, name: str, say: Callable[[str], None]) -> None:
    path = config.output / "caches" / name
    record = config.output / "caches" / f"{name}.json"
    step, keys = "extract-teacher-features", [*config.caches[name], f"cache.path={path}"]
    what = _what(file, step, keys)
    if not _is_done(_read(record), step, what, record):
        say(f"cache {name}")
        seconds = _command(step, file, keys, config.output / "caches" / f"{name}.log")
        _note(record, step, {"what": what, "seconds": seconds})


def _run_one(
    config: AblateConfig, file: Path, name: str, seed: int, say: Callable[[str], None]
) -> tuple[dict[str, float], float]:
    """The commands of one variant and seed; figures by measure, and the seconds of all its commands together."""
    variant, folder = config.variants[name], config.output / "runs" / name / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "done.json"
    for step, keys in _steps(config, variant, folder, seed):
        what = _what(file, step, keys)
        if _is_done(_read(record), step, what, record):
            continue
        say(f"{name}, seed {seed}: {step}")
        seconds = _command(step, file, keys, folder / "commands.log")
        figure = None if step == "pretrain" else _figure(step, folder)
        _note(record, step, {"what": what, "seconds": seconds, "top1": figure})
    done = _read(record)
    wanted = {step: entry for step, entry in done.items() if step == "pretrain" or step in config.measures}
    figures = {step: entry["top1"] for step, entry in wanted.items() if entry["top1"] is not None}
    return figures, sum(entry["seconds"] for entry in wanted.values())


def _steps(config: AblateConfig, variant: VariantConfig, folder: Path, seed: int) -> Iterator[tuple[str, list[str]]]:
    """(command, its keys) in order."""
    start = [f"init={folder / 'pretrained'}"]
    if variant.pretrain is None:
        start = ["init=null", *variant.student]
    else:
        cache = "cache=null" if variant.cache is None else f"cache.path={config.output / 'caches' / variant.cache}"
        yield "pretrain", [cache, f"output={folder / 'pretrained'}", f"seed={seed}", *variant.pretrain]
    for measure in config.measures:
        output = folder / "finetuned" if measure == "finetune" else folder
        yield measure, [*start, f"seed={seed}", f"output={output}"]


def _what(file: Path, step: str, keys: list[str]) -> str:
    """What a command was asked, resolved: it tells whether an edited file asks for something else."""
    root = cast(DictConfig, OmegaConf.load(file))
    root[step] = OmegaConf.merge(root[step], OmegaConf.from_dotlist(keys))
    return xxhash.xxh3_128_hexdigest(OmegaConf.to_yaml(root[step], resolve=True).encode())


def _read(record: Path) -> dict[str, Any]:
    return dict(json.loads(record.read_text(encoding="utf-8"))) if record.exists() else {}


def _note(record: Path, step: str, entry: dict[str, Any]) -> None:
    write_text(record, json.dumps({**_read(record), step: entry}, indent=1) + "\n")


def _is_done(done: Mapping[str, Any], step: str, what: str, record: Path) -> bool:
    if step in done and done[step]["what"] != what:
        raise ConfigError(
            f"{record.parent} holds {step} with other keys than now: choose another ablate.output, or remove that "
            "folder"
        )
    return step in done


def _command(name: str, file: Path, keys: list[str], log: Path) -> float:
    """Run one command in a process of its own; seconds. Its output goes to the log, after the command itself.

    Stopped, it waits until the command has saved: ctrl-C reaches both, a SIGTERM is passed on.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments = [name, "--config", str(file), *keys]
    began = time.perf_counter()
    with log.open("a", encoding="utf-8") as stream, Interruption(_STOPPING) as interruption:
        stream.write("$ mrmae " + " ".join(arguments) + "\n")
        stream.flush()
        command = [sys.executable, "-m", "cli", *arguments]
        child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)  # noqa: S603 - our own command
        passed_on = False
        while child.poll() is None:
            time.sleep(0.1)
            if interruption.requested and not passed_on:
                child.terminate()
                passed_on = True
    if interruption.requested or child.returncode == INTERRUPTED:
        raise Interrupted(f"{name} was stopped; the same command goes on from there")
    if child.returncode:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1]
        raise PipelineError(f"{name} failed: {last} (all of it in {log})")
    return time.perf_counter() - began


def _figure(measure: str, folder: Path) -> float:
    """Top-1 as the command left it: in metrics.json of k-NN and probe, in the last evaluation of a fine-tuning."""
    if measure != "finetune":
        records = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        return float(records[measure.replace("-", "_")]["top1"])
    lines = (folder / "finetuned" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evaluations = [row for row in map(json.loads, lines) if "top1" in row]
    if not evaluations:
        raise ConfigError(f"{folder / 'finetuned'} holds no evaluation: give finetune.val.path in the config")
    return float(evaluations[-1]["top1"])


def _write(config: AblateConfig, rows: Mapping[str, Row]) -> str:
    measures = [str(measure) for measure in config.measures]
    lines = [f"| | {' | '.join(measures)} | minutes a seed |", "|---|" + "---|" * (len(measures) + 1)]
    group = None
    for name, row in rows.items():
        if row.group != group and row.group:
            lines.append(f"| *{row.group}* |" + " |" * (len(measures) + 1))
        group = row.group
        cells = [_cell(row.summary(measure)) for measure in measures]
        lines.append(f"| {name} | {' | '.join(cells)} | {statistics.mean(row.seconds) / 60:.1f} |")
    seeds = len(config.seeds)
    what = f"mean ± sample standard deviation of {seeds} seeds" if seeds > 1 else "one seed: no spread was measured"
    text = f"Top-1, {what}.\n\n" + "\n".join(lines) + "\n"
    (config.output / "table.md").write_text(text, encoding="utf-8")
    with (config.output / "table.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["group", "variant", "seed", *measures, "seconds"])
        for name, row in rows.items():
            for place, seed in enumerate(config.seeds):
                figures = [row.figures[m][place] if m in row.figures else "" for m in measures]
                writer.writerow([row.group, name, seed, *figures, round(row.seconds[place], 1)])
    _draw(config.output / "bars.png", rows, measures)
    return text


def _cell(summary: tuple[float, float | None] | None) -> str:
    if summary is None:
        return "–"
    mean, spread = summary
    return f"{mean:.3f}" if spread is None else f"{mean:.3f} ± {spread:.3f}"


def _draw(path: Path, rows: Mapping[str, Row], measures: list[str]) -> None:
    """A panel for each measure, a bar for each variant, its spread as a line and each seed as a dot."""
    figure = Figure(figsize=(4.4 * len(measures), 0.9 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(measures), squeeze=False, sharey=True)[0]
    names = list(rows)
    groups = list(dict.fromkeys(row.group for row in rows.values()))
    for axis, measure in zip(axes, measures, strict=True):
        for place, name in enumerate(names):
            summary = rows[name].summary(measure)
            if summary is None:
                continue
            colour = f"C{groups.index(rows[name].group) % 10}"
            axis.barh(place, summary[0], xerr=summary[1], color=colour, alpha=0.7, capsize=3)
            values = rows[name].figures[measure]
            axis.plot(values, [place] * len(values), "k.", markersize=4)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_title(f"{measure}, top-1", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=130)
