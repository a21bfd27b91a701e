"""Teachers, students and detectors from configs and checkpoints: what several stages build the same way."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.detection import Detector
from pipeline.errors import CheckpointError, ConfigError, TeacherError
from pipeline.models import (
    Classifier,
    Student,
    build_classifier,
    build_from_spec,
    build_student,
    layer_ids,
    load_model,
    load_weights,
    read_weights,
)
from pipeline.models.config import StudentConfig
from pipeline.teachers import Teacher, build_teacher
from pipeline.teachers.config import TeacherConfig
from pipeline.training.checkpoint import recorded_start, resolve_checkpoint
from pipeline.weights import state_digest

log = logging.getLogger(__name__)

# The students' pixels, as MAE normalises them: the mean and deviation of ImageNet's.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PIXEL_STATISTICS: dict[torch.device, tuple[Tensor, Tensor]] = {}


def normalise(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] → float32, as students take it, in the same memory order."""
    mean, std = _pixel_statistics(images.device)
    # One number for every pixel of an image: three alone would make a CPU walk channels-last memory in steps of three.
    every = torch.empty_like(images[:1], dtype=torch.float32)
    return images.float().sub_(every.copy_(mean)).div_(every.copy_(std))


def denormalise(images: Tensor) -> Tensor:
    """The inverse of `normalise`, float32 in [0, 1]."""
    mean = torch.tensor(_MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(_STD, device=images.device).view(1, 3, 1, 1)
    return (images * std + mean).clamp(0, 1)


def _pixel_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation [1, 3, 1, 1] in 0..255, made once for each device: numbers from the host make it wait."""
    if device in _PIXEL_STATISTICS:
        return _PIXEL_STATISTICS[device]
    with torch.inference_mode(False):  # born in inference mode, they could take no part in training
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in (_MEAN, _STD))
    if type(mean) is Tensor:  # not while something is traced or counted without data
        _PIXEL_STATISTICS[device] = mean, std
    return mean, std


def load_teacher(config: TeacherConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> Teacher:
    """Build the teacher; a `mrmae:` one from its run or checkpoint folder.

    Raises:
        TeacherError, CheckpointError: as `build_teacher` and `load_model`.
    """
    module: Any = None
    if config.spec.startswith("mrmae:"):
        model = load_model(resolve_checkpoint(Path(config.spec.removeprefix("mrmae:"))))
        module = model if isinstance(model, Classifier) else model.encoder
    return build_teacher(
        config.spec,
        weights=config.weights,
        image_size=config.image_size,
        tokens=config.tokens,
        layers=config.layers,
        module=module,
        device=device,
        dtype=dtype,
        compile=config.compile,
    )


def teacher_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What a teacher computes in: auto is bf16 on CUDA and fp32 elsewhere.

    Raises:
        ConfigError: bf16 on a CPU.
    """
    if precision == "bf16" and device.type == "cpu":
        raise ConfigError("precision=bf16 is for GPUs: on a CPU it is several times slower; use fp32")
    return torch.bfloat16 if precision != "fp32" and device.type == "cuda" else torch.float32


def teacher_of_cache(description: dict[str, Any], weights: str | None, device: torch.device) -> Teacher:
    """The live teacher that a cache's header describes, with `weights` in place of the recorded ones if given.

    Raises:
        TeacherError: it can't be built, or speaks with other weights than the cache's.
    """
    recorded, spec = description["weights"], description["spec"]
    ours = spec.startswith("mrmae:")
    if weights is None and not ours and recorded != "random" and "/" not in recorded:  # a hub's name has a slash
        raise TeacherError(f"the cache was made with the local weights {recorded}: say where they lie with --weights")
    config = TeacherConfig(
        spec=f"mrmae:{weights}" if ours and weights else spec,  # the run has moved or has been trained on
        weights=None if ours else weights or ("random" if recorded == "random" else None),
        image_size=description["image_size"],
        tokens=description["tokens"],
        layers=description["layers"],
        compile=description.get("compile", False),
    )
    teacher = load_teacher(config, device, getattr(torch, description["dtype"]))
    if not teacher.recognises(description["weights_sha256"]):
        raise TeacherError(f"the weights of teacher {config.spec} are not those that the cache was made with")
    return teacher


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
    state, spec = _read(init) if init and not recorded else (None, None)
    identity = f"weights {state_digest(state)[:16]}" if state else None
    if recorded:
        spec, identity = recorded.spec.get("encoder", recorded.spec), recorded.identity  # a detector's is a part
    encoder = encoder_arguments(init, student, spec)
    completed = student.model_copy(update=encoder) if student else None
    return Start(encoder, completed, state, identity)


def _read(init: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Weights, and what they are of if they say it."""
    state, spec = read_weights(resolve_checkpoint(init))
    if spec is None:
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
    state, spec = _read(init) if init else (None, None)
    arguments = student_arguments(init, student, spec)
    strict = spec is not None and spec.get("name") == arguments["name"]
    model: Student | Classifier
    if spec is not None and strict:
        changes = arguments if spec.get("kind") == "student" else _of_encoder(arguments)
        model = build_from_spec({**spec, **changes})
    elif state is not None and {"head.weight", "fc_norm.weight"} <= state.keys():  # a classifier that pools by the mean
        strict = True
        model = build_classifier(num_classes=len(state["head.weight"]), pool="mean", **_of_encoder(arguments))
    else:
        model = build_student(**arguments, objective="mae")
    if state is not None:
        log.info("init: %s", load_weights(model, state, strict=strict))
    return model


def build_detector(
    encoder: Mapping[str, Any],
    categories: Sequence[tuple[int, str]],
    state: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> tuple[Detector, dict[str, int]]:
    """Mask R-CNN on the encoder that a classifier with these arguments has, its positions brought to `image_size`.

    Args:
        encoder: keyword arguments of `build_classifier`.
        categories: (id, name), ascending by id.
        state: weights of a student, a classifier or a public checkpoint.
        options: as in `DetectorConfig`.

    Returns:
        The detector, and the layer of each parameter for layer-wise learning rates: ConvViT's convolution stages are
        layer 0, pyramid and heads the last.

    Raises:
        ConfigError: sizes that don't fit together. CheckpointError: the weights don't fit.
    """
    classifier = build_classifier(num_classes=1, **encoder)
    if state is not None:
        log.info("init: %s", load_weights(classifier, state, strict=False))
    spec = {"kind": "detector", "encoder": dict(encoder), "categories": [list(one) for one in categories], **options}
    detector = Detector(classifier.encoder, classes=len(categories), spec=spec, **options)
    ids, last = layer_ids(classifier)
    layer_of = {id(parameter): ids[name] for name, parameter in classifier.named_parameters()}
    return detector, {name: layer_of.get(id(parameter), last) for name, parameter in detector.named_parameters()}


def load_detector(path: Path) -> Detector:
    """The detector of a run or checkpoint folder.

    Raises:
        CheckpointError: nothing usable there, or no detector.
    """
    folder = resolve_checkpoint(path)
    state, spec = read_weights(folder)
    if spec is None or spec.get("kind") != "detector":
        raise CheckpointError(f"{path} holds no detector: give the output of a `detect` run")
    options = {key: value for key, value in spec.items() if key not in ("kind", "encoder", "categories")}
    try:
        detector, _ = build_detector(spec["encoder"], spec["categories"], **options)
        detector.load_state_dict(state, strict=True)
    except (KeyError, TypeError, RuntimeError, ConfigError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{folder} doesn't describe a detector of this version: {reason}") from error
    return detector


def features_of(model: Student | Classifier, device: torch.device) -> Callable[[Tensor], Tensor]:
    """uint8 images [B, 3, S, S] → the mean of the patch tokens [B, D]: what k-NN and probes read."""
    model = model.to(device).eval()
    encoder = model if isinstance(model, Classifier) else model.encoder
    return lambda images: encoder.forward_tokens(normalise(images.to(device))).mean(1)


def _of_encoder(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if not key.startswith("decoder_")}
