"""Run variants × seeds, and tabulate them.

    mrmae ablate --config configs/ablation_imagenette.yaml

Reads the sections of the commands in --config, and `ablate` beside them. Each run is the plain commands, in processes
of their own, with keys that anybody could type:

    mrmae pretrain --config FILE cache.path=... output=... seed=... (and the variant's keys)
    mrmae knn --config FILE init=... seed=... output=... (linear-probe and finetune alike)

Caches that differ (views, quantiser) are extracted first, each once. jobs=N runs N variants at once, on the GPUs in
turn. minutes=M bounds the time: a few steps of every variant are timed, and then all train for as many steps as fit,
equal for all, k-NN on the way counted; checkpoints come on top. Where the section `pretrain` measures k-NN on the way
(pretrain.knn), variants are ranked at equal steps and at equal seconds. transfer names further labelled data sets, on
which k-NN and linear probe are measured too.

Writes caches, runs with their commands.log, and table.md, table.csv, bars.png, curves.png to ablate.output, anew when a
run ends. Each variant and seed costs a pre-training and its measures. Started again, it skips what is done and goes on
where a run stopped, also on another machine that has the folder under the same path.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipeline.assembly.chains.ablation import Curve, Row, read_cost, read_curve, write_tables
from pipeline.assembly.chains.chain import Chain
from pipeline.assembly.chains.jobs import Environment, run_jobs
from pipeline.errors import ConfigError
from pipeline.files import write_text
from pipeline.locks import lock_folder
from stages.configs.ablate import AblateConfig

_TIMED_STEPS = 20  # of each variant, to learn what a step costs
_MARGIN = 0.95  # of the time that is left: the last jobs don't end together


class Found(NamedTuple):
    """What one variant and seed reached.

    Attributes:
        top1: measure → top-1.
        seconds: of all commands.
        curve: of k-NN on the way.
        is_new: whether commands were started meanwhile; else all was done before.
    """

    top1: dict[str, float]
    seconds: float
    curve: Curve | None
    is_new: bool


def run(config: AblateConfig, file: Path, say: Callable[[str], None] = lambda line: None) -> str:
    """Run everything that isn't done; returns the table.

    Raises:
        ConfigError: the file lacks a section that will be needed; another process writes the folder; too few minutes.
        PipelineError: a command failed; its log is named. Interrupted: it was stopped.
    """
    chain = Chain(file, say)
    chain.check(_sections(config))
    with lock_folder(config.output), chain:
        return _Ablation(config, chain).run()


def _sections(config: AblateConfig) -> Iterator[str]:
    """The commands that will run."""
    yield from config.measures
    if any(variant.pretrain is not None for variant in config.chosen.values()):
        yield "pretrain"
    if any(variant.cache is not None for variant in config.chosen.values()):
        yield "extract-teacher-features"


@dataclass(frozen=True)
class _Ablation:
    config: AblateConfig
    chain: Chain

    def run(self) -> str:
        config, began = self.config, time.monotonic()
        kept = self._kept_steps()
        for name in dict.fromkeys(variant.cache for variant in config.chosen.values() if variant.cache is not None):
            folder = config.output / "caches"
            keys = [*config.caches[name], f"cache.path={folder / name}"]
            self.chain.run("extract-teacher-features", keys, folder / "logs" / name, f"cache {name}")
        length = [] if config.minutes is None else _length(kept or self._decide_steps(config.minutes, began))
        rows = {name: Row(variant.group) for name, variant in config.chosen.items()}
        # Seed by seed: a whole table comes early, its spread later.
        runs = [(name, seed) for seed in config.seeds for name in config.chosen]
        tasks = [
            partial(self._run_one, name, seed, config.output / "runs" / name / f"seed{seed}", length)
            for name, seed in runs
        ]
        table = ""
        for number, found in run_jobs(tasks, config.jobs):
            name, seed = runs[number]
            rows[name].seconds[seed] = found.seconds
            for measure, top1 in found.top1.items():
                rows[name].figures.setdefault(measure, {})[seed] = top1
            if found.curve is not None:
                rows[name].curves[seed] = found.curve
            # Runs of an earlier start come one after the other: they are written together.
            table = write_tables(config.output, rows, config.seeds, config.columns) if found.is_new else ""
        return table or write_tables(config.output, rows, config.seeds, config.columns)

    def _kept_steps(self) -> int | None:
        """The steps that an earlier start of this folder decided on.

        Raises:
            ConfigError: they were decided for another number of minutes.
        """
        kept = self.config.output / "steps.json"
        if self.config.minutes is None or not kept.exists():
            return None
        decided = json.loads(kept.read_text(encoding="utf-8"))
        if decided["minutes"] != self.config.minutes:
            raise ConfigError(
                f"{self.config.output} holds runs for minutes={decided['minutes']:g}: give that, or another output"
            )
        return int(decided["steps"])

    def _decide_steps(self, minutes: float, began: float) -> int:
        """The equal steps of every pre-training; they are kept, so a folder that goes on has them too."""
        steps = self._fitting_steps(minutes * 60, began)
        write_text(self.config.output / "steps.json", json.dumps({"minutes": minutes, "steps": steps}) + "\n")
        return steps

    def _fitting_steps(self, budget: float, began: float) -> int:
        """Time some steps of each variant and what comes with them (starts, measures), and divide what is left.

        The section's own max_steps stays the most.
        """
        config = self.config
        names = [name for name, variant in config.chosen.items() if variant.pretrain is not None]
        runs = len(config.chosen) * len(config.seeds)
        at_once = min(config.jobs, runs)
        # As many side by side as later, so that a step is timed under the load that it will have.
        copies = -(-at_once // len(names))
        timed = [(name, config.output / f"timed{copy or ''}" / name) for copy in range(copies) for name in names]
        tasks = [partial(self._run_one, name, config.seeds[0], folder, _length(_TIMED_STEPS)) for name, folder in timed]
        rates, beside = list[float](), list[float]()  # seconds, by timed run
        for number, found in run_jobs(tasks, config.jobs):
            cost = read_cost(timed[number][1] / "pretrained")
            rates.append(cost.rate)
            starts = found.seconds - _TIMED_STEPS * cost.step - cost.knns(_TIMED_STEPS)
            beside.append(max(0.0, starts) + cost.knn)
        turns = math.ceil(runs / config.jobs)  # runs that follow each other
        left = (budget - (time.monotonic() - began)) * _MARGIN / turns - statistics.mean(beside)
        steps = int(left / statistics.mean(rates))
        if steps < _TIMED_STEPS:
            lacking = (_TIMED_STEPS * statistics.mean(rates) - left) * turns / _MARGIN
            raise ConfigError(
                f"minutes={budget / 60:g} leaves no time to train, for starts and measures take most of it: give "
                f"{math.ceil((budget + lacking) / 60)} or more, or fewer variants, seeds or measures"
            )
        return min(steps, self.chain.section("pretrain").get("max_steps") or steps)

    def _run_one(self, name: str, seed: int, folder: Path, length: list[str], environment: Environment) -> Found:
        """The commands of one variant and seed, in one folder."""
        top1, seconds, before = dict[str, float](), 0.0, self.chain.commands
        for step in _steps(self.config, name, seed, folder, length):
            title = f"{name}, seed {seed}" + (f", {step.folder.name}" if step.folder != folder else "")
            done = self.chain.run(step.command, step.keys, step.folder, title, step.output, environment)
            seconds += done.seconds
            if done.top1 is not None:
                top1[step.column] = done.top1
        trained = self.config.variants[name].pretrain is not None
        curve = read_curve(folder / "pretrained") if trained else None
        return Found(top1, seconds, curve, self.chain.commands > before)


def _length(steps: int) -> list[str]:
    """Keys of a pre-training of so many steps; an epoch has one at least."""
    return [f"epochs={steps}", f"max_steps={steps}"]


class Step(NamedTuple):
    """A command of one variant and seed.

    Attributes:
        folder: of its done.json and commands.log.
        output: where a measure leaves its top-1; None of a pre-training.
        column: of the table, for a measure.
    """

    command: str
    keys: list[str]
    folder: Path
    output: Path | None = None
    column: str = ""


def _steps(config: AblateConfig, name: str, seed: int, folder: Path, length: list[str]) -> Iterator[Step]:
    """The commands of one variant and seed, in order."""
    variant = config.variants[name]
    start = [f"init={folder / 'pretrained'}", f"seed={seed}"]
    if variant.pretrain is None:
        start = ["init=null", *variant.student, f"seed={seed}"]
    else:
        cache = "cache=null" if variant.cache is None else f"cache.path={config.output / 'caches' / variant.cache}"
        named = {key.partition("=")[0] for key in length}
        changes = [*(key for key in variant.pretrain if key.partition("=")[0] not in named), *length]
        yield Step("pretrain", [cache, f"output={folder / 'pretrained'}", f"seed={seed}", *changes], folder)
    for measure in config.measures:
        output = folder / "finetuned" if measure == "finetune" else folder
        yield Step(measure, [*start, f"output={output}"], folder, output, measure)
    for data_set, keys in config.transfer.items():
        for measure in config.measures:
            if measure != "finetune":
                place = folder / data_set
                yield Step(measure, [*start, f"output={place}", *keys], place, place, f"{measure}, {data_set}")
