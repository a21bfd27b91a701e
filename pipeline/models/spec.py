"""The spec of a model: what `model.json` keeps of it, the keyword arguments that build it again."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.models.sizes import EncoderSizes

# Options that came later: at their defaults a spec leaves them out, so that runs of before find it unchanged.
_LATER = {
    "target": "tokens",
    "decoder": "full",
    "predict_share": None,
    "summary_weight": 0.0,
    "summary_source": None,
    "conv_mlp_ratio": None,
    "grid": None,
    "target_scale": 1.0,
}
OF_BEFORE = {"target_scale": 1.0}  # what a spec without an option means, where that isn't the builder's default


def spec_of(given: dict[str, Any], sizes: type[EncoderSizes]) -> dict[str, Any]:
    """A builder's arguments, so that `build_student(**json.loads(json.dumps(spec)))` builds the same model again.

    Args:
        given: the builder's locals; its keyword arguments of `sizes` in one entry.

    Raises:
        TypeError: a keyword that is neither an option nor a size.
    """
    defaults = dict.fromkeys(sizes.__annotations__) | {"image_size": 224}
    options = {key: value for key, value in given.items() if key not in ("name", "num_classes", "sizes")}
    if unknown := given["sizes"].keys() - defaults.keys():
        raise TypeError(f"no such option: {', '.join(sorted(unknown))}")
    first = {key: given[key] for key in ("name", "num_classes") if key in given}
    complete = {**first, **defaults, **given["sizes"], **options}
    return {key: _plain(value) for key, value in complete.items() if (key, value) not in _LATER.items()}


def _plain(value: Any) -> Any:
    """A value as JSON holds it: mappings as dicts, sequences as lists."""
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
