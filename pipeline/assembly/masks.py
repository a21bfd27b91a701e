"""Which masks a pre-training draws: what its config, its student and the teacher's attention allow."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.assembly.knowledge import Knowledge
from pipeline.configs.data import Focus, MaskConfig
from pipeline.data.masks import MaskSampler, predicted_count, visible_count
from pipeline.errors import ConfigError
from pipeline.models import Student
from pipeline.processes import processes

log = logging.getLogger(__name__)


def draw_masks(
    config: MaskConfig, seed: int, knowledge: Knowledge, student: Student, recorded: Mapping[str, Any] | None
) -> MaskSampler:
    """The sampler of the student's masks.

    Args:
        recorded: the identity of the run that goes on, if there is one. From before several masks by attention were
            disjoint, it keeps its own.

    Raises:
        ConfigError: no teacher has the attention that `focus` asks for; several masks for a student that masks nothing.
    """
    if not student.objective.masks:
        _check_whole_views(config, student.spec["objective"])
    patches = student.grid[0] * student.grid[1]
    keep = visible_count(patches, config.mask_ratio) if student.objective.masks else patches
    masks = MaskSampler(
        patches=patches,
        keep=keep,
        focus=_focus(config, knowledge) if student.objective.masks else "random",
        seed=seed,
        count=config.masks_per_sample,
        predict=predicted_count(patches, keep, student.predict_share),
    )
    drew_apart = bool(recorded) and "disjoint" not in (recorded or {}).get("mask", {})
    return replace(masks, independent=masks.shares_a_draw and drew_apart)


def _focus(config: MaskConfig, knowledge: Knowledge) -> Focus:
    """How visible patches are chosen: at random where nothing is mimicked."""
    if not knowledge.dims or config.focus == "random":
        return "random"
    if knowledge.attended is None:
        raise ConfigError(
            f"{' and '.join(knowledge.dims)}: no attention to focus by; set mask.focus=random, or add the cache of a "
            "teacher that has attention (caches.NAME.path=...)"
        )
    if len(knowledge.dims) > 1 and processes().is_main_process:
        log.info("masks are drawn by the attention of %s", knowledge.attended)
    return config.focus


def _check_whole_views(config: MaskConfig, objective: str) -> None:
    """ConfigError for several masks of a sample; other keys of masks are told to have no effect."""
    if config.masks_per_sample > 1:
        raise ConfigError(
            f"mask.masks_per_sample={config.masks_per_sample}, but objective={objective} masks nothing: leave it out"
        )
    default = MaskConfig()
    given = [f"mask.{name}" for name in MaskConfig.model_fields if getattr(config, name) != getattr(default, name)]
    if given and processes().is_main_process:
        log.warning("%s has no effect: objective=%s masks nothing", " and ".join(given), objective)
