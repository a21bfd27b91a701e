"""The `mrmae` command: loads a config, calls a stage, prints what it found.

The only place that prints errors and sets exit codes: 0 well, 1 the command found damage, 2 it could not run, 130 it
was interrupted. Heavy imports happen inside the commands, so that `mrmae --help` answers at once.
"""

import errno
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_EPILOG = "Every key of a config can be given as key=value, for instance: batch_size=256 data.path=/data/train"


# What gloo and NCCL say in the processes that wait for one that has ended.
_SIGNS_OF_ANOTHERS_END = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "communicator was aborted",
)


class _Group(click.Group):
    """Prints one line for what a user can mend; a traceback only with --debug."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except KeyboardInterrupt:
            _fail(ctx, "interrupted; what is committed or checkpointed stays, the same command goes on from there", 130)
        except BrokenPipeError:
            # The reader of our output left, as `| head` does: no fault of ours, and nothing left to say.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Exception as error:  # noqa: BLE001 - the one boundary between the program and its user
            message, code = _explain(error)
            _fail(ctx, message, code)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of a project, not of the alphabet


def _explain(error: Exception) -> tuple[str, int]:
    from pipeline.errors import PipelineError

    if isinstance(error, PipelineError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error.filename or 'while writing'}): free some space, then run again to go on", 2
    if isinstance(error, OSError):
        return f"{error.filename or 'the system'}: {error.strerror or error}", 2
    if type(error).__name__ == "OutOfMemoryError":
        return "the accelerator's memory is full: raise accum_iter in training, lower batch_size in everything else", 2
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_ANOTHERS_END):
        return "another process of this job has ended: the line that it left says why", 2
    first = (str(error).strip().splitlines() or [""])[0]
    return f"unexpected {type(error).__name__}: {first} (mrmae --debug ... shows where)", 2


def _fail(ctx: click.Context, message: str, code: int) -> None:
    if ctx.find_root().params.get("debug"):
        click.echo(traceback.format_exc(), err=True)
    click.echo(f"error: {message}", err=True)
    ctx.exit(code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EPILOG)
@click.option("--debug", is_flag=True, help="Show tracebacks, and what the libraries warn about.")
@click.option("-q", "--quiet", is_flag=True, help="Say only what went wrong, and the result.")
@click.version_option(package_name="mrmae")
def main(debug: bool, quiet: bool) -> None:
    """MR-MAE pre-training without paying for the teacher at every step.

    Stage 1 runs a CLIP or DINO teacher once over your images and keeps its features in a cache; stage 2 trains masked
    autoencoders from images and cache. `mrmae demo` shows all of it in minutes, offline.
    """
    first = int(os.environ.get("RANK", "0")) == 0
    level = logging.DEBUG if debug else logging.INFO if first and not quiet else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for wing in ("pipeline", "stages", "benchmarks"):
        logging.getLogger(wing).setLevel(level)
    if not debug:
        import warnings

        warnings.simplefilter("ignore")


def configured(command: F) -> F:
    """The arguments of a command that takes a config."""
    command = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(command)
    return click.option("--config", type=click.Path(path_type=Path), help="YAML file; see configs/.")(command)


@main.command("extract-teacher-features")
@configured
@click.option("--init-only", is_flag=True, help="Calibrate and create the cache, extract nothing: before a job array.")
@click.option("--shard-range", metavar="A:B", help="Only the shards A to B-1, for job arrays.")
def extract_teacher_features(
    config: Path | None, overrides: tuple[str, ...], init_only: bool, shard_range: str | None
) -> None:
    """Stage 1: run a teacher over the images once and cache its token features and attention.

    Reads images (data.path: a class-folder tree, a flat folder, or tars by glob or brace pattern) and a teacher
    (teacher.spec; teacher.weights for a local file). Writes a cache at cache.path: 151 KB a view for 196 tokens of
    width 768, so 194 GB for ImageNet-1k at views.count=1 (`mrmae plan` tells yours). Costs one forward pass of the
    teacher per view. Run it again after a stop: finished shards are kept. Start it with torchrun or accelerate launch
    for several processes: they share the shards out.
    """
    from pipeline.config import load_config
    from stages.extract_teacher_features import ExtractConfig, run

    loaded = load_config(ExtractConfig, config, overrides, "extract-teacher-features")
    _print_facts(run(loaded, init_only=init_only, shard_range=shard_range))


@main.command("verify-cache")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--level", type=click.Choice(["quick", "full", "deep"]), default="full", show_default=True)
@click.option("--data", metavar="PATH", help="Where the images lie now, if not where they were extracted from.")
@click.option("--weights", metavar="FILE", help="The teacher's weights, for --level deep and --repair.")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Records that --level deep computes again.",
)
@click.option("--repair", is_flag=True, help="Extract damaged shards again, and those whose lost images decode by now.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def verify_cache(
    path: Path, level: str, data: str | None, weights: str | None, samples: int, repair: bool, as_json: bool
) -> None:
    """Check that a cache is what was extracted. Exit code 0: sound; 1: damaged; 2: could not check.

    quick looks at files and sizes, full at every byte and record and at the source images, deep also runs the live
    teacher again on some records. Reads the cache at PATH; writes nothing, but with --repair. Costs seconds (quick),
    one reading of the cache (full), a few forward passes of the teacher more (deep).
    """
    from stages.verify_cache import VerifyConfig, run

    options = {"path": path, "level": level, "data": data, "weights": weights, "samples": samples, "repair": repair}
    report = run(VerifyConfig.model_validate(options))
    click.echo(json.dumps(report.to_json(), indent=1) if as_json else report.to_text())
    sys.exit(0 if report.sound else 1)


@main.command("pretrain")
@configured
def pretrain(config: Path | None, overrides: tuple[str, ...]) -> None:
    """Stage 2: train a masked autoencoder that mimics the cached teacher on visible patches (MR-MAE).

    Reads images (data.path) and a cache (cache.path); mimic.objective=mae needs no cache. Writes to output:
    config.yaml, metrics.jsonl, tensorboard/, checkpoints/. Costs what plain MAE costs: no step runs a teacher. Stops
    in good order on ctrl-C or SIGTERM; the same command goes on from the newest sound checkpoint.
    """
    from pipeline.config import load_config
    from stages.pretrain import PretrainConfig, run

    _print_facts(run(load_config(PretrainConfig, config, overrides, "pretrain")))


@main.command("finetune")
@configured
@click.option("--eval", "evaluation", is_flag=True, help="Train nothing: measure init=RUN, or several by their mean.")
def finetune(config: Path | None, overrides: tuple[str, ...], evaluation: bool) -> None:
    """Train a classifier from a pre-trained checkpoint (init=RUN), or from scratch (student.name=...).

    Reads labelled images: data.path and val.path, or data.path alone if it holds train/ and val/. Writes to output as
    pretrain does, and checkpoints/best by top-1. Prints top-1 and top-5 on the validation set. Costs a full training of
    the encoder on all patches. --eval needs init and val.path alone; init=[RUN,RUN] averages the logits.
    """
    from pipeline.config import load_config
    from stages.finetune import EvaluateConfig, FinetuneConfig, evaluate, run

    if evaluation:
        _print_facts(evaluate(load_config(EvaluateConfig, config, overrides, "finetune")))
    else:
        _print_facts(run(load_config(FinetuneConfig, config, overrides, "finetune")))


@main.command("detect")
@configured
@click.option("--eval", "eval_only", is_flag=True, help="Score the run's newest checkpoint, or checkpoint=PATH.")
def detect(config: Path | None, overrides: tuple[str, ...], eval_only: bool) -> None:
    """Train Mask R-CNN on a pre-trained checkpoint (init=RUN), or from scratch (student.name=...).

    Reads annotated images in COCO's format (data.train.images, data.train.annotations, the same for data.val). Writes
    to output as finetune does, and checkpoints/best by box AP; --eval writes metrics.json, predictions.json and,
    with pictures=N, predictions.png. Prints box and mask AP. Costs many times a fine-tuning: see docs/detection.md.
    """
    from pipeline.config import load_config
    from stages.detect import DetectConfig, run

    _print_facts(run(load_config(DetectConfig, config, overrides, "detect"), eval_only=eval_only))


@main.command("linear-probe")
@configured
def linear_probe(config: Path | None, overrides: tuple[str, ...]) -> None:
    """Train linear classifiers on frozen features: how much a checkpoint knows, without fine-tuning.

    Reads labelled images (data.path, val.path) and a checkpoint (init). Writes metrics.json to output if given. Costs
    one forward pass over the images, then minutes for all learning rates at once.
    """
    from pipeline.config import load_config
    from stages.linear_probe import LinearProbeConfig, run

    _print_facts(run(load_config(LinearProbeConfig, config, overrides, "linear-probe")))


@main.command("knn")
@configured
def knn(config: Path | None, overrides: tuple[str, ...]) -> None:
    """Classify by the nearest training images in frozen features: the cheapest honest number.

    Reads labelled images (data.path, val.path) and a checkpoint (init), or a teacher (teacher.spec). Writes
    metrics.json to output if given. Costs one forward pass over the images.
    """
    from pipeline.config import load_config
    from stages.knn import KnnConfig, run

    _print_facts(run(load_config(KnnConfig, config, overrides, "knn")))


@main.command("ablate")
@click.option("--config", required=True, type=click.Path(path_type=Path), help="A chain's YAML with a section ablate.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def ablate(config: Path, overrides: tuple[str, ...]) -> None:
    """Variants × seeds from one file, and the table they make: each run is the plain commands.

    Reads the sections of the commands in --config, and ablate beside them. Writes caches, runs and table.md, table.csv,
    bars.png to ablate.output. Costs a pre-training and its measures for each variant and seed; skips what is done.
    """
    from pipeline.config import load_config
    from stages.ablate import AblateConfig, run

    click.echo(run(load_config(AblateConfig, config, overrides, "ablate"), config, say=lambda line: click.echo(line)))


@main.command("visualize")
@configured
def visualize(config: Path | None, overrides: tuple[str, ...]) -> None:
    """Draw what a student sees: masked input, reconstruction, attention and features, its teacher's beside them.

    Reads a checkpoint (init), images (images=[FILE,...] or data.path), and for the teacher a cache (cache.path) or a
    live one (teacher.spec). Writes one PNG: output, by default visualize.png in the run folder. Costs a forward pass
    of a few images.
    """
    from pipeline.config import load_config
    from stages.visualize import VisualizeConfig, run

    _print_facts(run(load_config(VisualizeConfig, config, overrides, "visualize")))


@main.command("export")
@configured
def export(config: Path | None, overrides: tuple[str, ...]) -> None:
    """Write a trained encoder for other programs: a ViT for timm, a ConvViT as safetensors and JSON, both as ONNX.

    Reads a checkpoint (init). Writes a new folder, output, and only if the written weights give the same features.
    Costs two forward passes.
    """
    from pipeline.config import load_config
    from stages.export import ExportConfig, run

    _print_facts(run(load_config(ExportConfig, config, overrides, "export")))


@main.command("report")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="The page; by default report.html in the folder.")
def report(path: Path, output: Path | None) -> None:
    """One HTML page of a run folder: config, curves, throughput, evaluations, pictures; opens without a network.

    Reads what pretrain, finetune, knn, linear-probe, visualize or demo left at PATH. Writes one file. Costs seconds.
    """
    from stages.report import ReportConfig, run

    _print_facts(run(ReportConfig(path=path, output=output)))


@main.command("cache-info")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def cache_info(path: Path, as_json: bool) -> None:
    """What a cache holds: teacher, views, bytes a view, fidelity, how complete, what could not be read.

    Reads the header and the commit records at PATH, no data; writes nothing. Costs seconds.
    """
    from stages.cache_info import CacheInfoConfig, run

    facts = run(CacheInfoConfig(path=path))
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        _print_facts(facts)


@main.command("plan")
@configured
def plan(config: Path | None, overrides: tuple[str, ...]) -> None:
    """Before a disk is filled: bytes, GPU-hours, the read rate of training, and what a cache can save at most.

    Reads nothing but its keys (samples, views, teacher, store, quantiser, ...); writes nothing. Costs no time.
    """
    from pipeline.config import load_config
    from stages.plan import PlanConfig, run

    _print_facts(run(load_config(PlanConfig, config, overrides, "plan")))


@main.command("teachers")
def teachers() -> None:
    """The teachers by name: grid, width, input size, GMAC and bytes a view.

    Reads and writes nothing; needs no weights. Costs a second. Any other ViT goes by timm:NAME or open_clip:ARCH:TAG.
    """
    from pipeline.teachers import list_teachers

    click.echo(f"{'name':<16}{'grid':>8}{'width':>7}{'pixels':>8}{'GMAC':>8}{'bytes a view':>14}  what")
    for row in list_teachers():
        grid = f"{row.grid[0]}x{row.grid[1]}"
        figures = f"{grid:>8}{row.dim:>7}{row.image_size:>8}{row.gmacs:>8.1f}{row.bytes_per_view:>14}"
        click.echo(f"{row.name:<16}{figures}  {row.about}")


@main.group("benchmark")
def benchmark() -> None:
    """Measure this machine: every figure as JSON, ratios taken in pairs in one run. Reads, writes, costs: see each."""


_BENCHMARKS = {
    "cache": """Cache reads, writes and verification against bare loops that do the least that could do the job.

    Reads a cache (path) or writes a synthetic one into a temporary folder. Costs about a minute and 3 GB.""",
    "decode": """JPEG decoders on your own images: images/s, and whether their pixels agree.

    Reads images (data.path), writes nothing. Costs half a minute.""",
    "extract": """Extraction against the teacher's bare forward; two token choices in one pass; bf16 against fp32.

    Reads images (data.path) or draws some; writes caches into a temporary folder. Costs minutes on a CPU.""",
    "gpu": """All that a GPU is asked for, in eight minutes: extraction, steps eager and compiled, sparse over dense.

    Draws its images, has random teachers; writes into a temporary folder. Says each part as it is done; then JSON.""",
    "student": """Training steps of students; for ConvViT the sparse convolution stages against the dense ones.

    Reads and writes nothing. Costs minutes on a CPU.""",
    "detector": """Training steps of Mask R-CNN on a student: seconds, multiply-adds and, on a GPU, memory.

    Reads and writes nothing. Costs minutes on a CPU.""",
    "pretrain": """Steps of MAE, of MR-MAE from a cache and of MR-MAE with a live teacher, by turns; loader, step.

    Reads images (data.path) or draws some; writes caches into a temporary folder. Costs minutes on a CPU.""",
}


def _add_benchmark(name: str, about: str) -> None:
    @benchmark.command(name, help=about)
    @configured
    def run(config: Path | None, overrides: tuple[str, ...]) -> None:
        from importlib import import_module

        from pipeline.config import load_config

        stage = import_module(f"benchmarks.{name}")
        loaded = load_config(getattr(stage, f"Benchmark{name.title()}Config"), config, overrides, "benchmark")
        click.echo(json.dumps(stage.run(loaded), indent=1))


for _name, _about in _BENCHMARKS.items():
    _add_benchmark(_name, _about)


@main.command("demo")
@configured
def demo(config: Path | None, overrides: tuple[str, ...]) -> None:
    """The whole pipeline on handwritten digits, offline, in under four minutes on two CPU cores.

    Trains a small teacher, caches its features, verifies the cache, pre-trains MAE and MR-MAE students for equal steps
    and compares them. Reads nothing (the digits come with scikit-learn); writes to output, by default runs/demo. Costs
    a few minutes of two cores and 50 MB.
    """
    from pipeline.config import load_config
    from stages.demo import DemoConfig, run

    click.echo(run(load_config(DemoConfig, config, overrides, "demo"), say=lambda line: click.echo(line)))


def _print_facts(facts: dict[str, Any]) -> None:
    if not facts or int(os.environ.get("RANK", "0")):
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        click.echo(f"{name:<{width}}  {_readable(value)}")


def _readable(value: Any) -> str:
    if isinstance(value, float):
        digits = 6 if 0.999 < abs(value) < 1 else 4  # a cosine of 0.99997 is not 1
        return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, Iterable) and not isinstance(value, str):
        return json.dumps(value)
    return str(value)


if __name__ == "__main__":
    main()
