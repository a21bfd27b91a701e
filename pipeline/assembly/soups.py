"""Soups: the mean of the weights of several fine-tunings of one start (Wortsman et al. 2022, arXiv 2203.05482)."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.assembly.accuracies import LabelledCrops, accuracies
from pipeline.config import Config
from pipeline.data.labelled import LabelledDataset
from pipeline.errors import CheckpointError, ConfigError
from pipeline.locks import lock_folder
from pipeline.models import Classifier, model_record
from pipeline.ownership import closed_with_stage
from pipeline.pixels import normalise
from pipeline.processes import processes
from pipeline.training.batch_norms import has_statistics, retake_statistics
from pipeline.training.checkpoint import Checkpoint, load_checkpoint, resolve_checkpoint, save_checkpoint
from pipeline.weights import state_digest

_FOR_STATISTICS = 10_000  # images of the training that the batch norms of a soup see
_ALIKE = ("classes", "class_names")  # of a run's identity


def average(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each tensor, taken in float64: that of equal ones is what they are. Integers are the first's."""
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in states[0].items()
    }


def choose_greedily(accuracies: Sequence[float], measure: Callable[[list[int]], float]) -> tuple[list[int], float]:
    """What of several models makes the best soup, and its accuracy: recipe 1 of the paper.

    From the best model on, each is added if the soup's accuracy on images held out doesn't fall.

    Args:
        accuracies: of each model alone.
        measure: numbers of models → the accuracy of their soup.
    """
    order = sorted(range(len(accuracies)), key=lambda number: -accuracies[number])
    chosen, best = order[:1], accuracies[order[0]]
    for number in order[1:]:
        accuracy = measure([*chosen, number])
        if accuracy >= best:
            chosen, best = [*chosen, number], accuracy
    return chosen, best


class Candidates(NamedTuple):
    """Fine-tunings of one student, and the images that a soup of them needs."""

    inits: Sequence[Path]  # runs or their checkpoints
    models: Sequence[Classifier]  # theirs, on the device, in eval mode
    train: LabelledCrops | None  # for the statistics of batch norms
    val: LabelledCrops  # choose a greedy soup


class Soup(NamedTuple):
    """A mean of weights, its place and identity, and what it was made of."""

    model: Classifier
    path: Path
    identity: dict[str, Any]
    facts: dict[str, Any]


def make_soup(candidates: Candidates, combine: str, path: Path) -> Soup:
    """The mean of all weights ("uniform"), or of those that don't lower the accuracy on `val` ("greedy").

    Running statistics of batch norms are no average: they are taken anew from images of the training.

    Args:
        path: of the checkpoint; locked until the stage ends.

    Raises:
        ConfigError, CheckpointError: as `_common_identity`; another soup lies there, or images are lacking.
    """
    inits, models, train, val = candidates
    identity = _common_identity(inits, models)
    identity["soup"] = {"combine": combine, "of": [state_digest(model.state_dict()) for model in models]}
    if combine == "greedy":
        identity["soup"]["val"] = val.dataset.source.digest()
    if processes().is_main_process:
        closed_with_stage(lock_folder(path.parent))
    _check_kept(path, identity)
    if has_statistics(models[0]) and train is None:
        raise ConfigError(
            "the model has batch norms, whose statistics must be taken anew for averaged weights: give data.path=..., "
            "the images of the training"
        )
    states = [{name: value.cpu() for name, value in model.state_dict().items()} for model in models]
    soup = copy.deepcopy(models[0])

    def fill(numbers: Sequence[int]) -> None:
        soup.load_state_dict(average([states[number] for number in numbers]))
        if len(numbers) > 1 and train is not None and has_statistics(soup):
            retake_statistics(soup, _images(train))

    def measure(numbers: Sequence[int]) -> float:
        fill(numbers)
        return accuracies([soup], val)[0][0]["top1"]

    numbers: Sequence[int] = range(len(models))
    facts: dict[str, Any] = {}
    if combine == "greedy":
        alone = [row["top1"] for row in accuracies(models, val)[0][: len(models)]]
        numbers, best = choose_greedily(alone, measure)
        facts = {"val": {"each": dict(zip(map(str, inits), alone, strict=True)), "soup": best}}
    fill(numbers)
    return Soup(soup, path, identity, {"soup_of": [str(inits[number]) for number in numbers], **facts})


def save_soup(soup: Soup, metrics: dict[str, Any], config: Config) -> None:
    """Write it as a checkpoint without an optimiser."""
    checkpoint = Checkpoint(soup.path, 0, soup.identity, metrics)
    save_checkpoint(checkpoint, soup.model.state_dict(), model_record(soup.model), config)


def _images(train: LabelledCrops) -> Iterator[Tensor]:
    """Normalised images, evenly spread, this process's share."""
    source, shown = train.dataset.source, min(len(train), _FOR_STATISTICS)
    chosen = source.select(np.arange(shown, dtype=np.int64) * len(train) // shown)
    dataset = LabelledDataset(chosen, train.dataset.image_size, crop=train.dataset.crop)
    for batch in LabelledCrops(dataset, train.batch_size, train.workers).batches():
        yield normalise(batch.images)


def _common_identity(inits: Sequence[Path], models: Sequence[Classifier]) -> dict[str, Any]:
    """What the runs share: model, start and classes, for the checkpoint of their soup.

    Raises:
        ConfigError: they differ in one of these, so that the mean of their weights means nothing.
        CheckpointError: one of them is no run's and can't say what it started from.
    """
    identities = [_identity(init) for init in inits]
    for init, identity, model in zip(inits, identities, models, strict=True):
        start = identity.get("init")
        if not start:
            raise ConfigError(f"init={init} was trained from scratch: a soup needs runs that started from one init")
        differ = [key for key in _ALIKE if identity.get(key) != identities[0].get(key)]
        if start != identities[0]["init"]:
            raise ConfigError(
                f"init={init} started from other weights than {inits[0]} ({start}, {identities[0]['init']}): the mean "
                "of their weights means nothing; use combine=logits"
            )
        if differ:
            raise ConfigError(f"init={init} has other {differ[0]} than {inits[0]}: their weights can't be averaged")
        if _described(model) != _described(models[0]):
            key = next(key for key in model.spec if model.spec[key] != models[0].spec.get(key))
            raise ConfigError(
                f"init={init} is another model than {inits[0]} ({key}={model.spec[key]}, "
                f"{models[0].spec.get(key)}): their weights can't be averaged"
            )
    shared = {key: identities[0][key] for key in ("init", *_ALIKE) if key in identities[0]}
    return {"stage": "finetune", "model": models[0].spec, **shared}


def check_unseen(inits: Sequence[Path], data: str) -> None:
    """Raises ConfigError if a run was trained on other images than those of the digest `data`."""
    for init in inits:
        if _identity(init).get("data") != data:
            raise ConfigError(
                f"init={init} was trained on other images than data.path without val.share: it may have seen those "
                "that choose the soup; give the data.path and val.share of its training"
            )


def _check_kept(path: Path, identity: Mapping[str, Any]) -> None:
    """Raises ConfigError if another soup than that of `identity` lies there."""
    try:
        kept = load_checkpoint(path, only=())
    except CheckpointError:  # absent, or torn and to be replaced
        return
    if kept.identity != identity:
        raise ConfigError(f"{path} is a soup of other runs or images: choose another output")


def _identity(init: Path) -> dict[str, Any]:
    folder = resolve_checkpoint(init)
    if not (folder / "checkpoint.json").is_file():
        raise CheckpointError(
            f"init={init} doesn't say what it started from: for a soup give runs or their checkpoints, not exports"
        )
    return load_checkpoint(folder, only=()).identity


def _described(model: Classifier) -> dict[str, Any]:
    return {key: value for key, value in model.spec.items() if key != "gradient_checkpointing"}
