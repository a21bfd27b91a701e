"""Features of images in a file for other programs: safetensors, npz or parquet. No pickle in any of them.

| | features | keys, labels | facts |
|---|---|---|---|
| .safetensors | tensor `features` | metadata `keys` (a JSON list), tensor `labels` | metadata |
| .npz | array `features` | arrays `keys` (text), `labels` | array `facts` (JSON) |
| .parquet | column `features` (lists of fixed size) | columns `key`, `label` | metadata of the schema |
"""

import importlib.util
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import ConfigError
from pipeline.files import remove_dead_partials, whole_file
from pipeline.tensor_files import save_tensors

_LARGEST_HEADER = 90_000_000  # bytes of JSON; readers of safetensors refuse more than 100 MB


class Embeddings(NamedTuple):
    """N images.

    Attributes:
        keys: what they are called.
        features: float32 [N, D], or [N, h, w, D] for every patch.
        labels: int64 [N], -1 without a class; None where no class is known.
        facts: what the features are of.
    """

    keys: list[str]
    features: NDArray[np.float32]
    labels: NDArray[np.int64] | None
    facts: dict[str, str]


def check_format(path: Path) -> None:
    """Before hours of work: whether a file of this name can be written.

    Raises:
        ConfigError: an unknown ending, or parquet without pyarrow.
    """
    if path.suffix not in _WRITERS:
        raise ConfigError(f"output={path}: choose a name that ends with {', '.join(_WRITERS)}")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f"output={path}: parquet needs pyarrow: pip install -e '.[parquet]', or choose .npz")


def write_embeddings(path: Path, embeddings: Embeddings) -> None:
    """Write the file, whole or not at all; a former one is replaced.

    Raises:
        ConfigError: more keys than safetensors holds.
        OSError, SafetensorError: disk full, read-only, ...; a former file stays as it is.
    """
    _WRITERS[path.suffix](path, embeddings)


def _write_safetensors(path: Path, embeddings: Embeddings) -> None:
    keys = json.dumps(embeddings.keys, ensure_ascii=False)
    if len(keys.encode()) > _LARGEST_HEADER:
        raise ConfigError(f"output={path}: safetensors holds no {len(embeddings.keys)} keys: choose .npz or .parquet")
    tensors = {"features": torch.from_numpy(embeddings.features)}
    if embeddings.labels is not None:
        tensors["labels"] = torch.from_numpy(embeddings.labels)
    save_tensors(tensors, path, {**embeddings.facts, "keys": keys})


def _write_npz(path: Path, embeddings: Embeddings) -> None:
    arrays: dict[str, NDArray[np.generic]] = {
        "features": embeddings.features,
        "keys": np.array(embeddings.keys),
        "facts": np.array(json.dumps(embeddings.facts)),
    }
    if embeddings.labels is not None:
        arrays["labels"] = embeddings.labels
    remove_dead_partials(path)
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _write_parquet(path: Path, embeddings: Embeddings) -> None:
    import pyarrow
    from pyarrow import parquet

    features = pyarrow.array(embeddings.features.ravel())
    for size in reversed(embeddings.features.shape[1:]):
        features = pyarrow.FixedSizeListArray.from_arrays(features, size)
    columns = {"key": pyarrow.array(embeddings.keys), "features": features}
    if embeddings.labels is not None:
        columns["label"] = pyarrow.array(embeddings.labels)
    remove_dead_partials(path)
    with whole_file(path) as partial, partial.open("wb") as file:
        parquet.write_table(pyarrow.table(columns).replace_schema_metadata(embeddings.facts), file)


_WRITERS = {".safetensors": _write_safetensors, ".npz": _write_npz, ".parquet": _write_parquet}
