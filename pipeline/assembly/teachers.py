"""Live teachers, from a config or from what a cache says of its own."""

from pathlib import Path
from typing import Any

import torch

from pipeline.configs.teachers import TeacherConfig
from pipeline.errors import ConfigError, TeacherError
from pipeline.models import Classifier, load_model
from pipeline.teachers import Teacher, build_teacher
from pipeline.training.checkpoint import resolve_checkpoint


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
        layer=config.layer,
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
    is_student = spec.startswith("mrmae:")
    if weights is None and not is_student and recorded != "random" and "/" not in recorded:  # a hub's name has a slash
        raise TeacherError(f"the cache was made with the local weights {recorded}: say where they lie with --weights")
    config = TeacherConfig(
        spec=f"mrmae:{weights}" if is_student and weights else spec,  # the run has moved or has been trained on
        weights=None if is_student else weights or ("random" if recorded == "random" else None),
        image_size=description["image_size"],
        tokens=description["tokens"],
        layer=description.get("layer"),
        layers=description["layers"],
        compile=description.get("compile", False),
    )
    teacher = load_teacher(config, device, getattr(torch, description["dtype"]))
    if not teacher.recognises(description["weights_sha256"]):
        raise TeacherError(f"the weights of teacher {config.spec} are not those that the cache was made with")
    return teacher
