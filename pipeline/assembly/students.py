"""Students and classifiers, from configs and checkpoints together."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.assembly.initial_weights import named_by_init, read_init
from pipeline.configs.models import StudentConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models import (
    Classifier,
    Student,
    build_classifier,
    build_from_spec,
    build_student,
    load_weights,
    read_export,
    read_weights,
)
from pipeline.models.timm_names import is_maskable, is_timm
from pipeline.pixels import normalise
from pipeline.training.checkpoint import load_checkpoint, recorded_start, resolve_checkpoint
from pipeline.weights import state_digest

log = logging.getLogger(__name__)


def student_arguments(
    init: Path | None, student: StudentConfig | None, spec: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Keyword arguments of the student that a config and a checkpoint's description mean together.

    Keys that the config gives go over the description's. A config that names another student stands alone; a name that
    is merely the default names none.

    Args:
        init: what the description is of, for the message.
        spec: as in `model.json`; None of a lone weights file, or without a checkpoint.

    Raises:
        ConfigError: neither says which student.
    """
    given = student.model_dump(exclude_unset=True, exclude_none=True) if student else {}
    described = {key: value for key, value in (spec or {}).items() if key in StudentConfig.model_fields}
    if student and "name" in given and given["name"] != described.get("name"):
        described = student.model_dump()
    chosen = {key: value for key, value in (described | given).items() if value is not None}
    if "name" not in chosen:
        raise ConfigError(
            f"init={init} doesn't say what it is: give student.name=... as well"
            if init
            else "give init=RUN, or student.name=... to start from scratch"
        )
    return chosen


def encoder_arguments(
    init: Path | None, student: StudentConfig | None, spec: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What `student_arguments` says of the encoder, for `build_classifier`."""
    return _of_encoder(student_arguments(init, student, spec))


class Start(NamedTuple):
    """What a fine-tuning starts from."""

    encoder: dict[str, Any]  # keyword arguments of `build_classifier`
    student: StudentConfig | None  # as it was given, completed: what config.yaml should say
    state: dict[str, Tensor] | None  # the initial weights; None from scratch, and where a checkpoint brings its own
    identity: str | None  # of these weights, by their content: a path may change its form, and what lies there


def read_start(init: Path | None, student: StudentConfig | None, output: Path) -> Start:
    """The encoder and the weights that `init` and `student` name.

    Where `output` holds a run that started from `init`, what it recorded counts, and `init` need not be there any more.

    Raises:
        ConfigError: as `student_arguments`. CheckpointError: the weights aren't there.
    """
    recorded = recorded_start(output, init)
    student = named_by_init(init, student)
    state, spec = _read(init, student) if init and not recorded else (None, None)
    identity = f"weights {state_digest(state)[:16]}" if state else None
    if recorded:
        spec, identity = recorded.spec.get("encoder", recorded.spec), recorded.identity  # a detector's is a part
    encoder = encoder_arguments(init, student, spec)
    completed = student.model_copy(update=encoder) if student else None
    return Start(encoder, completed, state, identity)


def _read(init: Path, student: StudentConfig | None) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Weights, and what they are of if they say it."""
    name = student.name if student else None
    state, spec = read_init(init, name)
    if spec is None and not (name and is_timm(name)):
        log.warning(
            "init=%s doesn't say how pixels were normalised: taking ImageNet's mean and deviation, as MAE and ConvMAE "
            "do; timm's augreg weights want 0.5 instead and would give other features (teacher.spec=timm:NAME knows)",
            init,
        )
    return state, spec


def load_encoder(init: Path | None, student: StudentConfig | None) -> Student | Classifier:
    """A model whose `forward_tokens` gives features: from `init`, or untrained from `student`.

    Our own checkpoints say what they are, and `student` changes single keys of it; for a lone weights file it has to
    name the student.

    Raises:
        ConfigError: as `student_arguments`. CheckpointError: the weights aren't there or don't fit.
    """
    student = named_by_init(init, student)
    state, spec = _read(init, student) if init else (None, None)
    arguments = student_arguments(init, student, spec)
    strict = spec is not None and spec.get("kind") != "encoder" and spec.get("name") == arguments["name"]
    model: Student | Classifier
    if spec is not None and strict:
        changes = arguments if spec.get("kind") == "student" else _of_encoder(arguments)
        model = build_from_spec({**spec, **changes})
    elif state is not None and {"head.weight", "fc_norm.weight"} <= state.keys():  # a classifier that pools by the mean
        strict = True
        model = build_classifier(num_classes=len(state["head.weight"]), pool="mean", **_of_encoder(arguments))
    else:
        model = build_student(**arguments, objective="mae" if is_maskable(arguments["name"]) else "distil")
    if state is not None:
        log.info("init: %s", load_weights(model, state, strict=strict))
    return model


class NamedClassifier(NamedTuple):
    """A classifier and what its labels mean."""

    model: Classifier
    names: tuple[str, ...]  # by label; numbers where nothing names them
    folders: tuple[str, ...]  # the class folders that it was trained on; none where its images had numbers


def load_classifier(init: Path, student: StudentConfig | None, image_size: int | None) -> NamedClassifier:
    """A fine-tuned classifier: of a run, a checkpoint, an export, or a lone weights file that `student` describes.

    Args:
        image_size: pixels; None for those that it was trained with. Positions are resampled.

    Raises:
        ConfigError: as `student_arguments`. CheckpointError: no classifier there, or the weights don't fit.
    """
    folder = resolve_checkpoint(init)
    state, spec = read_weights(folder)
    if "head.weight" not in state:
        raise CheckpointError(f"init={init} holds no classifier but a pre-trained student: fine-tune it first")
    arguments = encoder_arguments(init, student, spec) | ({"image_size": image_size} if image_size else {})
    classes = len(state["head.weight"])
    pool = (spec or {}).get("pool") or ("mean" if "fc_norm.weight" in state else "cls")
    model = build_classifier(num_classes=classes, pool=pool, **arguments)
    load_weights(model, state)
    names = class_names(folder)
    return NamedClassifier(model, names or tuple(map(str, range(classes))), _class_folders(folder))


def class_names(checkpoint: Path) -> tuple[str, ...]:
    """The names of a classifier's classes by label; none where the checkpoint or export knows numbers alone."""
    if (checkpoint / "checkpoint.json").is_file():
        identity = load_checkpoint(checkpoint, only=()).identity
        return tuple(identity.get("class_names") or identity.get("classes") or ())
    return tuple(((read_export(checkpoint) or {}).get("label_names")) or ())


def _class_folders(checkpoint: Path) -> tuple[str, ...]:
    """The class folders that a classifier was trained on; of an export what it calls its classes."""
    if (checkpoint / "checkpoint.json").is_file():
        return tuple(load_checkpoint(checkpoint, only=()).identity.get("classes") or ())
    return class_names(checkpoint)


def tokens_of(model: Student | Classifier, device: torch.device) -> Callable[[Tensor], Tensor]:
    """uint8 images [B, 3, S, S] → patch tokens [B, L, D]: k-NN and probes read their mean."""
    model = model.to(device).eval()
    encoder = model if isinstance(model, Classifier) else model.encoder
    return lambda images: encoder.forward_tokens(normalise(images.to(device)))


def _of_encoder(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if not key.startswith(("decoder", "predict_share"))}
