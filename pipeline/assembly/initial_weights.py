"""What `init` names: a run, a checkpoint or a weights file; or `timm:NAME`, the public weights of a model of timm."""

import re
from pathlib import Path
from typing import Any

import timm
from torch import Tensor

from pipeline.configs.models import StudentConfig
from pipeline.errors import CheckpointError, TeacherError
from pipeline.meta import meta_device
from pipeline.models import read_weights
from pipeline.models.timm_names import is_timm, timm_model
from pipeline.teachers.conversion import to_timm
from pipeline.teachers.timm_vit import build_timm, known_config
from pipeline.teachers.weights import fetching
from pipeline.teachers.weights import read_weights as read_weights_of_release
from pipeline.training.checkpoint import resolve_checkpoint
from pipeline.weights import read_state

# How the reader of teachers' weights names its keys, and what they are called here.
_KEYS = (("teacher.weights=", "init="), ("the teacher that", "the student that"), ("teacher 'timm:", "'timm:"))


def named_by_init(init: Path | None, student: StudentConfig | None) -> StudentConfig | None:
    """The student's config with the name that `init=timm:NAME` gives, unless it has one."""
    if init is None or not is_timm(str(init)) or (student and "name" in student.model_fields_set):
        return student
    name = {"name": str(init)}
    return student.model_copy(update=name) if student else StudentConfig.model_validate(name)


def read_init(init: Path, student: str | None) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """A state dict, and the spec of the model if the checkpoint has one.

    Args:
        student: its name. Of timm's, a weights file may be in timm's naming or in that of the model's own release.

    Raises:
        CheckpointError: the weights aren't there, can't be fetched, or are of another model.
    """
    if is_timm(str(init)):
        return _public_weights(str(init), None), None
    path = resolve_checkpoint(init)
    if student is not None and is_timm(student) and path.is_file():
        return _public_weights(student, path), None
    return read_weights(path)


def _public_weights(student: str, file: Path | None) -> dict[str, Tensor]:
    """By the names that the student has, positions on the grid that the weights were trained on."""
    named = timm_model(student)
    try:
        return _of_vit(named.name, file) if named.maskable else _of_feature_map(named.name, file)
    except TeacherError as error:
        message = str(error)
        for of_teachers, of_students in _KEYS:
            message = message.replace(of_teachers, of_students)
        raise CheckpointError(message) from error


def _of_vit(name: str, file: Path | None) -> dict[str, Tensor]:
    """A plain ViT's tensors up to its final norm."""
    if file is None:
        state = dict(build_timm(name, None, None)[0].model.state_dict())
    else:
        known_config(name)
        with meta_device():
            model: Any = timm.create_model(name, num_classes=0)
        model.pos_embed = None  # those of the file keep their grid
        state = to_timm(read_weights_of_release(file), model, name, str(file)).state
    state = {key: value for key, value in state.items() if not key.startswith("attn_pool.")}
    if any(key.startswith("norm.") for key in state):
        return state
    return {re.sub(r"^fc_norm\.", "norm.", key): value for key, value in state.items()}  # a norm after the mean


def _of_feature_map(name: str, file: Path | None) -> dict[str, Tensor]:
    """A network's tensors without its classifier."""
    if file is None:
        with fetching(f"timm:{name}", "its file"):
            state: dict[str, Tensor] = timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    else:
        with meta_device():
            expected = timm.create_model(name, num_classes=0).state_dict()
        classifier = timm.get_pretrained_cfg_value(name, "classifier")
        heads = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
        found = read_state(file).items()
        state = {key: value for key, value in found if key in expected or not key.startswith(heads)}
    return {f"model.{key}": value for key, value in state.items()}
