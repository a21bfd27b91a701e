"""Detectors: Mask R-CNN on the encoder of a student, new or from a checkpoint."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.detection import Detector
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models import build_classifier, layer_ids, load_weights, read_weights
from pipeline.models.feature_map import FeatureMap
from pipeline.training.checkpoint import resolve_checkpoint

log = logging.getLogger(__name__)


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
    if isinstance(classifier.encoder, FeatureMap) or getattr(classifier.encoder, "rope", None) is not None:
        raise ConfigError(
            f"student.name={encoder['name']} can't attend in windows: detect with a ViT without rotary positions, "
            "or a ConvViT"
        )
    if state is not None:
        log.info("init: %s", load_weights(classifier, state, strict=False))
    spec = {
        "kind": "detector",
        "encoder": dict(encoder),
        "categories": [list(category) for category in categories],
        **options,
    }
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
