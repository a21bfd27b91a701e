"""Weights in and out of a model: our own folders, public checkpoints, other grids, students turned into classifiers.

`load_weights` raises, or returns a report of what it loaded and what it did not.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from pipeline.errors import CheckpointError, PipelineError
from pipeline.models.build import build_classifier, build_student
from pipeline.models.classifier import Classifier
from pipeline.models.convvit import ConvViT
from pipeline.models.mr_mae import FOR_DECODER, Student
from pipeline.models.spec import OF_BEFORE
from pipeline.models.timm_names import is_maskable
from pipeline.models.timm_vit import TimmViT
from pipeline.tensor_files import save_tensors
from pipeline.weights import load_tensors, misfit, read_state

# Parts of a task and not of the encoder, by the first part of the flat name.
TASK_PARTS = frozenset(
    {"decoder_embed", "mask_token", "decoder_pos_embed", "decoder_blocks", "decoder_cross_blocks", "decoder_norm"}
    | {"decoder_pred", "mimic", "summary", "fc_norm", "head"}
)


@dataclass
class LoadReport:
    """Names in the model and in the file, by what was done with them.

    Attributes:
        loaded: taken from the file.
        resampled: among these, positions brought to the model's grid.
        fresh: of the model, not in the file (or of another shape there): as they were built.
        dropped: in the file, without a place in the model.
    """

    loaded: list[str]
    resampled: list[str]
    fresh: list[str]
    dropped: list[str]

    def __str__(self) -> str:
        texts = [f"{len(self.loaded)} tensors loaded"]
        for label, names in (("resampled", self.resampled), ("fresh", self.fresh), ("dropped", self.dropped)):
            parts = Counter(_part(name) for name in names)
            texts += [f"{label}: " + ", ".join(f"{part} ({count})" for part, count in parts.items())] if parts else []
        return "; ".join(texts)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read a state dict, and the spec of the model if the file has one.

    Args:
        path: a folder that `save_weights` wrote (or any holding its two files) or an export, read as it is, or a file
            that `pipeline.weights.read_state` takes. The spec of an export has the kind "encoder".

    Raises:
        CheckpointError: absent, torn, of an unknown kind, or holding no tensors.
    """
    if not path.is_dir():
        return read_state(path), None
    export = read_export(path)
    if export is not None:
        spec = _encoder_spec(export, path)
        state = load_tensors(path / "model.safetensors")
        return _of_feature_map(state, path, spec) if not is_maskable(spec["name"]) else (state, spec)
    return load_tensors(path / "model.safetensors"), _read_json(path / "model.json")


def _of_feature_map(
    state: Mapping[str, Tensor], path: Path, spec: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An export of another network of timm by our names, with the classifier that lies beside it."""
    named, head = {f"model.{name}": value for name, value in state.items()}, path / "head.safetensors"
    if not head.is_file():
        return named, spec
    return named | {f"head.{name}": value for name, value in load_tensors(head).items()}, {**spec, "pool": "mean"}


def save_weights(model: Student | Classifier, folder: Path) -> None:
    """Write `model.safetensors` and `model.json` (kind and spec) into an existing folder."""
    save_tensors(model.state_dict(), folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps(model_record(model), indent=2) + "\n", encoding="utf-8")


def model_record(model: Student | Classifier) -> dict[str, Any]:
    """The content of `model.json`: the model's kind and the keyword arguments that rebuild it."""
    return {"kind": "classifier" if isinstance(model, Classifier) else "student", **model.spec}


def build_from_spec(record: Mapping[str, Any]) -> Student | Classifier:
    """Build the model that `model.json` describes, with fresh weights.

    Raises:
        CheckpointError: no such kind or no such options.
    """
    spec = dict(record)
    kind = spec.pop("kind", None)
    if kind not in ("student", "classifier"):
        raise CheckpointError(f"model.json: kind={kind!r} is neither student nor classifier; is it of another program?")
    try:
        return build_student(**OF_BEFORE | spec) if kind == "student" else build_classifier(**spec)
    except (TypeError, PipelineError) as error:
        raise CheckpointError(f"model.json doesn't describe a {kind} of this version: {error}") from error


def load_model(path: Path) -> Student | Classifier:
    """Build and load what a checkpoint folder holds.

    Raises:
        CheckpointError: as `read_weights` and `load_weights`; a lone file, which doesn't say what model it is.
    """
    state, record = read_weights(path)
    if record is None:
        raise CheckpointError(
            f"{path} is a lone file: give the checkpoint folder, whose model.json describes the model"
        )
    model = build_from_spec(record)
    load_weights(model, state)
    return model


def load_weights(model: Student | Classifier, state: Mapping[str, Tensor], *, strict: bool = True) -> LoadReport:
    """Load a state dict. Positions of another square grid are resampled, bicubic.

    Strict: every tensor of the model is in `state` with its shape, and nothing else is.

    Not strict, to start one kind of model from another: every tensor of the model's *encoder* must be there with its
    shape. Task parts (decoder, mimic and summary heads, `fc_norm`, `head`) are loaded where both have them in one
    shape. Otherwise the model's stay fresh and the file's are dropped. A student's `norm` and the outputs of ConvViT's
    levels are dropped too, if the model has none; a model that has them needs them. Anything else is an error.

    A ConvViT has no class token: one in the file is dropped, strict or not.

    Raises:
        CheckpointError: naming what is missing, extra, or of another shape; the model is then as it was.
    """
    expected = model.state_dict()
    fitted = {key: _fit_positions(model, key, value, expected) for key, value in state.items()}
    loaded = {key: value for key, value in fitted.items() if key in expected and value.shape == expected[key].shape}

    def optional(key: str) -> bool:
        if key == "cls_token" and isinstance(model.encoder, ConvViT):
            return True  # checkpoints of ConvMAE's authors carry one that their model never reads
        return not strict and (_part(key) in TASK_PARTS or (_part(key) in FOR_DECODER and key not in expected))

    problem = misfit(
        {key: value for key, value in expected.items() if not optional(key)},
        {key: value for key, value in fitted.items() if not optional(key)},
    )
    if problem:
        raise CheckpointError(f"the weights don't fit this model ({problem}): {_remedy(state, expected, strict)}")
    model.load_state_dict({**expected, **loaded})
    return LoadReport(
        loaded=list(loaded),
        resampled=[key for key in state if fitted[key] is not state[key]],
        fresh=[key for key in expected if key not in loaded],
        dropped=[key for key in state if key not in loaded],
    )


def _fit_positions(model: Student | Classifier, key: str, value: Tensor, expected: Mapping[str, Tensor]) -> Tensor:
    """Positions resampled to the model's grid if that is all that differs; any other tensor as it is."""
    if key not in ("pos_embed", "decoder_pos_embed") or key not in expected or value.ndim != 3:
        return value
    grid = model.encoder.grid
    prefix = expected[key].shape[1] - grid[0] * grid[1]  # some models have no positions for their prefix tokens
    cells = value.shape[1] - prefix
    side = isqrt(max(cells, 0))
    if value.shape == expected[key].shape or value.shape[2] != expected[key].shape[2] or not cells == side**2 > 0:
        return value
    antialias = isinstance(model.encoder, TimmViT)  # as timm itself resamples them, MAE does without
    resampled: Tensor = resample_abs_pos_embed(value, list(grid), [side, side], prefix, antialias=antialias)
    return resampled


def _remedy(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], strict: bool) -> str:
    """What helps where weights don't fit."""
    first = "blocks1.0.mlp.fc1.weight"  # [hidden, dim, 1, 1], of ConvViT
    if first in state and first in expected:
        (hidden, dim), former = state[first].shape[:2], expected[first].shape
        if dim == former[1] and hidden != former[0]:
            return f"set student.conv_mlp_ratio={hidden // dim}"
    return "check name and sizes, or load it as init" if strict else "check the student's name and sizes"


def _part(key: str) -> str:
    return key.partition(".")[0]


def read_export(path: Path) -> dict[str, Any] | None:
    """The config.json of an exported folder; None of anything else.

    Raises:
        CheckpointError: it can't be read.
    """
    is_export = (path / "config.json").is_file() and not (path / "model.json").exists()
    return _read_json(path / "config.json") if is_export else None


def _encoder_spec(export: Mapping[str, Any], path: Path) -> dict[str, Any]:
    sizes = export.get("student")
    if not isinstance(sizes, dict):
        raise CheckpointError(
            f"{path / 'config.json'} doesn't say which student it is of: export it again, or give "
            f"{path / 'model.safetensors'} and student.name=..."
        )
    return {**sizes, "kind": "encoder"}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        spec = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} can't be read ({error}): the folder is no complete checkpoint") from error
    if not isinstance(spec, dict):
        raise CheckpointError(f"{file} holds no keys and values: the folder is no complete checkpoint")
    return spec
