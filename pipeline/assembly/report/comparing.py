"""Which runs' metrics can be compared, and in which keys runs differ.

A loss is a mean over what the model was shown, of a distance that the config chooses. Two runs' losses mean the same
only where the keys agree that decide either. What the model is or how it is trained (size, decoder, learning rate,
batch) decides how low a loss gets, not what it means.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.assembly.report.outputs import Output, flatten

# What decides which views and masks a student was shown. Teachers are among it: they choose masks, caches bring views.
_SHOWN = (
    "data", "cache", "caches", "teacher", "teachers", "views", "mask.mask_ratio", "mask.focus",
    "student.image_size", "student.patch_size",
)  # fmt: skip
_TARGETS = (
    "mimic.objective", "mimic.target", "mimic.target_norm", "mimic.target_scale", "mimic.resize_targets",
    "mimic.mimic_loss", "mimic.fusion",
    "mimic.teacher_weights", "mimic.standardise_teachers", "mimic.drop_teachers",
)  # fmt: skip
_WEIGHTS = ("mimic.norm_pix_loss", "mimic.mimic_weight", "mimic.pixel_weight", "mimic.summary_weight")
# Stage → beginning of a metric's name → the keys that decide what it means. What isn't named can always be compared.
_DECIDING: dict[str, dict[str, tuple[str, ...]]] = {
    "pretrain": {
        "pixel_loss": (*_SHOWN, "mimic.norm_pix_loss"),
        "mimic_loss": (*_SHOWN, *_TARGETS),
        "summary_loss": (*_SHOWN, "mimic.teacher_weights"),
        "loss": (*_SHOWN, *_TARGETS, *_WEIGHTS),
        "knn_": ("knn.data", "knn.val", "knn.k", "knn.temperature"),
    },
    "finetune": {"loss": ("data", "val", "augment", "image_size"), "top": ("data", "val")},
    "detect": {"loss": ("data", "image_size", "detector", "jitter"), "box_": ("data.val",), "mask_": ("data.val",)},
    "segment": {
        "loss": ("data", "labels", "scale", "image_size"),
        "mIoU": ("data.val", "labels"),
        "pixel_accuracy": ("data.val", "labels"),
    },
}
_SIGNS = {"mimic": "pretrain", "augment": "finetune", "detector": "detect", "labels": "segment"}  # section → its stage
_WITHOUT_EFFECT = {"workers", "local", "local_limit", "read", "compile", "seed"}  # last parts of keys
_ABSENT = object()
_MOST_DIFFERENCES = 3  # that the note of a plot names
_LONGEST_VALUE = 30  # characters


class Comparable(NamedTuple):
    """Runs of which a metric means the same; `note` says what sets them apart from the others, if there are any."""

    runs: list[Output]
    note: str


def stage_of(output: Output) -> str:
    """The command that made a run, told by its config; "" where that can't be told."""
    return next((stage for section, stage in _SIGNS.items() if section in output.config), "")


def comparable(metric: str, runs: Sequence[Output]) -> list[Comparable]:
    """The runs, in groups that may share an axis; a run without a config is compared with none."""
    name = "loss" if metric == "grad_norm" else metric.removeprefix("grad_norm/")
    if not any(name.startswith(start) for starts in _DECIDING.values() for start in starts):
        return [Comparable(list(runs), "")]
    facts = [_facts(run, name) for run in runs]
    # A key that an earlier version didn't write says nothing.
    absent = {key for values in facts for key, value in values.items() if value is _ABSENT}
    groups: dict[str, list[int]] = {}
    for number, (run, values) in enumerate(zip(runs, facts, strict=True)):
        identity = {key: value for key, value in values.items() if key not in absent} or str(run.path)
        groups.setdefault(json.dumps(identity, sort_keys=True, default=str), []).append(number)
    notes = _notes([{k: v for k, v in facts[group[0]].items() if k not in absent} for group in groups.values()])
    return [
        Comparable([runs[number] for number in group], note) for group, note in zip(groups.values(), notes, strict=True)
    ]


def differing_keys(runs: Sequence[Output]) -> dict[str, list[str]]:
    """The keys of the configs, but for `output`, that not all runs agree on → each run's value as text."""
    configs = [flatten(run.config) for run in runs]
    found = {key: [_spell(config.get(key, _ABSENT)) for config in configs] for key in _differing(configs)}
    empty = {_spell(_ABSENT), _spell(None)}  # no section and a key without a value are the same
    return {key: values for key, values in found.items() if key != "output" and not set(values) <= empty}


def _facts(run: Output, name: str) -> dict[str, Any]:
    """What decides the meaning of a metric; empty where there is no config."""
    stage = stage_of(run)
    if not stage:
        return {}
    keys = next((keys for start, keys in _DECIDING[stage].items() if name.startswith(start)), ())
    return {"command": stage, **{key: _value(run.config, key) for key in keys}}


def _value(config: Mapping[str, Any], key: str) -> Any:
    """What a key comes to; `_ABSENT` where the section lacks it."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping):
            return None  # a section that is null
        value = value.get(part, _ABSENT)
    if key == "mask.focus" and not any(config.get(name) for name in ("cache", "caches", "teacher", "teachers")):
        return "random"  # without a teacher nothing else is possible
    if key == "student.patch_size" and value is None:
        name = str(_value(config, "student.name"))
        published = re.search(r"patch(\d+)", name)
        return int(published[1]) if published else name
    return _pruned(value)


def _pruned(value: Any) -> Any:
    """A section without the keys that decide nothing that a loss depends on."""
    if not isinstance(value, Mapping):
        return value
    return {key: _pruned(inner) for key, inner in value.items() if key not in _WITHOUT_EFFECT}


def _notes(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each group of runs the keys that set it apart from those of the same command, and the command if several."""
    flat = [flatten(values) for values in groups]
    commands = {values.get("command") for values in flat}
    notes = []
    for values in flat:
        differing = _differing([other for other in flat if other.get("command") == values.get("command")])
        parts = [str(values.get("command", "no config.yaml"))] if len(commands) > 1 or not values else []
        parts += [f"{key}={_shorten(_spell(values.get(key, _ABSENT)))}" for key in differing[:_MOST_DIFFERENCES]]
        notes.append(", ".join(parts + ["…"] * (len(differing) > _MOST_DIFFERENCES)))
    return notes if len(groups) > 1 else [""] * len(groups)


def _differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({_spell(config.get(key, _ABSENT)) for config in configs}) > 1]


def _spell(value: Any) -> str:
    """A value as on the command line."""
    if value is _ABSENT:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _shorten(text: str) -> str:
    """The end of a long text, which is where paths differ."""
    return text if len(text) <= _LONGEST_VALUE else f"…{text[1 - _LONGEST_VALUE :]}"
