"""The card of an exported model: a README.md, which the Hugging Face hub reads as a model card."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from omegaconf import OmegaConf

from pipeline.cards import fact_table
from pipeline.errors import PipelineError
from pipeline.evaluation.records import read_records
from pipeline.models import Classifier, Student
from pipeline.teachers import TEACHERS
from pipeline.training.checkpoint import load_checkpoint, resolve_checkpoint

# An entry of metrics.json → what the card calls it.
_MEASURES = {"knn": "k-NN", "linear_probe": "linear probe", "finetune_eval": "fine-tuned"}
_METRICS = {"top1": ("accuracy", "top-1"), "top5": ("top_5_accuracy", "top-5")}
_TIMM = """```python
import timm

model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```"""
_OWN = """```sh
hf download {repo} --local-dir model
mrmae embed init=model data.path=PHOTOS output=features.npz
```

timm has no such network. `config.json` says how the tensors of `model.safetensors` are to be used."""


@dataclass(frozen=True)
class Origin:
    """What the run folder of a checkpoint says.

    Attributes:
        recipes: command → its config, without the paths of the machine; the newest first.
        teachers: names, in the order of the run.
        metrics: measure → {"top1": ..., "top5": ...}, fractions in 0..1.
        step: of the checkpoint; None without one.
    """

    recipes: dict[str, dict[str, Any]]
    teachers: tuple[str, ...]
    metrics: dict[str, dict[str, float]]
    step: int | None


@dataclass(frozen=True)
class Description:
    """An exported model in words; `of_timm` says whether timm loads it."""

    kind: str
    network: str
    images: str
    checked: str
    of_timm: bool


def origin_of(init: Path) -> Origin:
    """Where the weights that `init` names come from; empty for those that no run here has made."""
    recipes: dict[str, dict[str, Any]] = {}
    teachers: tuple[str, ...] = ()
    step, metrics = None, dict[str, dict[str, float]]()
    folder = source = _resolved(init)
    while source is not None and (source / "checkpoint.json").is_file():
        checkpoint = load_checkpoint(source, only=("config.yaml",))
        config = OmegaConf.to_container(OmegaConf.load(source / "config.yaml"), resolve=True)
        assert isinstance(config, dict)
        stage = str(checkpoint.identity.get("stage", "finetune"))
        if source == folder:
            step = checkpoint.step
            found = read_records(_run_folder(source) / "metrics.json")
            metrics = {measure: _scores(found[measure]) for measure in _MEASURES if measure in found}
        recipes[stage] = _public(config)
        teachers = tuple({**checkpoint.identity.get("caches", {}), **checkpoint.identity.get("teachers", {})})
        start = config.get("init") if stage != "pretrain" else None
        # The runs of a soup stem from one pre-training: the first one leads there.
        source = _resolved(Path(start[0] if isinstance(start, list) else start)) if start else None
    return Origin(recipes, teachers, {name: scores for name, scores in metrics.items() if scores}, step)


def _run_folder(checkpoint: Path) -> Path:
    """runs/x of runs/x/checkpoints/step-N."""
    return checkpoint.resolve().parents[1] if checkpoint.resolve().parent.name == "checkpoints" else checkpoint


def _resolved(init: Path) -> Path | None:
    """The checkpoint folder; None for timm:NAME, and for what isn't there any more."""
    with suppress(PipelineError):
        return resolve_checkpoint(init)
    return None


def _scores(record: Any) -> dict[str, float]:
    return {name: record[name] for name in _METRICS if isinstance(record, dict) and isinstance(record.get(name), float)}


def _public(value: Any) -> Any:
    """A config without what it leaves open, and with the last part of each path: the others are a machine's own."""
    if isinstance(value, dict):
        return {key: _public(inner) for key, inner in value.items() if inner not in (None, {}, [])}
    if isinstance(value, list):
        return [_public(inner) for inner in value]
    return value.rstrip("/").rpartition("/")[2] if isinstance(value, str) else value


def describe(model: Student | Classifier, facts: Mapping[str, Any]) -> Description:
    """The card's words for an exported model; `facts` are what the export found: format, parameters, cosine."""
    encoder = model.encoder
    height, width = encoder.image_size
    return Description(
        f"classifier of {model.head.out_features} classes" if isinstance(model, Classifier) else "encoder",
        f"{model.spec['name']}, {facts['parameters'] / 1e6:.1f} M parameters",
        f"{height}x{width} pixels, in patches of {encoder.patch_size}",
        f"features of the written weights and of the run agree to a cosine of {facts['cosine']:.6f}",
        of_timm=facts["format"] == "timm",
    )


def model_card(repo: str, model: Description, origin: Origin, licence: str, dataset: str | None) -> str:
    """The text of the card, with the hub's metadata.

    Args:
        repo: OWNER/NAME on the hub.
        licence: of the weights, as the hub names licences.
        dataset: that the metrics were measured on. The hub's index of metrics asks for it, and stays empty without.
    """
    name = repo.rpartition("/")[2]
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=_METRICS[metric][0],
            metric_name=f"{_MEASURES[measure]}, {_METRICS[metric][1]}",
            metric_value=round(100 * value, 2),
        )
        for measure, scores in origin.metrics.items()
        for metric, value in scores.items()
        if dataset
    ]
    metadata = ModelCardData(
        license=licence,
        library_name="timm" if model.of_timm else "mrmae",
        pipeline_tag="image-feature-extraction" if model.kind == "encoder" else "image-classification",
        tags=["mrmae", "masked-image-modeling", *(["timm"] if model.of_timm else [])],
        model_name=name if results else None,
        eval_results=results or None,
    )
    teachers = ", ".join(f"{teacher} (licence: {_licence(teacher)})" for teacher in origin.teachers)
    facts = {
        "kind": model.kind,
        "network": model.network,
        "images": model.images,
        "checked": model.checked,
        "teacher": teachers or "none",
        "licence": f"{licence}: that of teachers and images decides",
    }
    if origin.step is not None:
        facts["steps"] = str(origin.step)
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {name}",
        "Trained by mrmae: MR-MAE pre-training (arXiv 2303.05475) from cached features of a teacher.",
        fact_table(facts),
        "## To load it",
        (_TIMM if model.of_timm else _OWN).format(repo=repo),
    ]
    if origin.metrics:
        rows = {_MEASURES[measure]: _percents(scores) for measure, scores in origin.metrics.items()}
        on = f" on {dataset}" if dataset else ""
        parts += ["## Metrics", f"What metrics.json in the run's folder holds, measured{on}.", fact_table(rows)]
    if origin.recipes:
        parts.append("## Recipe")
        recipes = {stage: OmegaConf.to_yaml(keys) for stage, keys in origin.recipes.items()}
        parts += [f"`mrmae {stage}`:\n\n```yaml\n{keys}```" for stage, keys in recipes.items()]
    return "\n\n".join(parts) + "\n"


def _percents(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{_METRICS[metric][1]} {100 * value:.2f} %" for metric, value in scores.items())


def _licence(teacher: str) -> str:
    return TEACHERS[teacher].licence if teacher in TEACHERS else "not known here"
