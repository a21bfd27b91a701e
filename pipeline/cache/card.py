"""The card that goes with a cache: a README.md, which the Hugging Face hub reads as a dataset card."""

from collections.abc import Sequence

from pipeline.cache.budget import readable
from pipeline.cache.format.commits import Commit
from pipeline.cache.format.fidelity import FidelityFigures
from pipeline.cache.format.header import CacheHeader
from pipeline.cards import fact_table

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))  # the hub's names

_ZARR = """```python
import numpy as np
import zarr

cache = zarr.open("PATH", mode="r")
tokens = cache["tokens"][0, 0]  # sample 0, view 0: [{rows}, {width}]
```"""
_TAR = """```python
import webdataset as wds
from safetensors.numpy import load

for sample in wds.WebDataset("PATH/shards/000000-00.tar", shardshuffle=False):
    image, tokens = sample["jpg"], load(sample["safetensors"])["tokens"]  # [{rows}, {width}]
```"""
_DEQUANTISED = {
    "int8": """
Tokens are int8. A token's features are `tokens * scale * std + mean`: `scale` lies beside the tokens, `mean` and `std`
of each channel in `cache.json` under `quantiser`.
""",
    "int4": """
Tokens are int4: rotated, and two channels in a byte. In Python, mrmae reads them as float32:

```python
from pipeline.cache import open_cache

tokens = open_cache("PATH").read(0, view=0, dequantise=True).tokens
```

Without mrmae, docs/cache-format.md of mrmae has the formula, in numpy.
""",
    "codes": """
Tokens are codes: the number of each token's cluster. The features of cluster `k` are `centroids[k] * std + mean`, all
in `cache.json` under `quantiser`:

```python
import base64
import json
from pathlib import Path

import numpy as np

quantiser = json.loads(Path("PATH/cache.json").read_text())["quantiser"]
centroids = np.frombuffer(base64.b64decode(quantiser["centroids"]), "<f2").reshape(quantiser["clusters"], -1)
features = centroids * np.float32(quantiser["std"]) + np.float32(quantiser["mean"])  # [clusters, channels]
```
""",
}
_SUMMARY = """
Row 0 of each view is the teacher's class token; the rows after it are the patches."""
_SUMMARY_STATISTICS = " Its `mean` and `std` are `summary_mean` and `summary_std`."


def card(header: CacheHeader, commits: Sequence[Commit], licence: str) -> str:
    """The text of the card.

    Args:
        licence: of the features, as the hub names licences.
    """
    teacher, views, dataset = header.teacher, header.view_policy, header.dataset
    size = sum(entry.bytes for commit in commits for entry in commit.files.values())
    dead = sum(len(commit.tombstones) for commit in commits)
    fidelity = FidelityFigures.merge(commit.fidelity for commit in commits)
    figures = fidelity.model_dump(exclude_none=True) if fidelity else {}
    reading = (_ZARR if header.store == "zarr" else _TAR).format(rows=header.rows, width=header.stored_dim)
    summary = _SUMMARY + _SUMMARY_STATISTICS * header.quantiser.has_scale if header.summary else ""
    category = next((name for bound, name in _SIZES if header.count < bound), "1M<n<10M")
    policy = ", ".join(f"{key} {value}" for key, value in views.model_dump().items())
    spec, digest = teacher.get("spec", ""), teacher.get("weights_sha256", "")
    facts = {
        "teacher": f"{teacher['name']} (`{spec}`, weights sha256 `{digest}`)",
        "licence": f"{licence}: that of the teacher's weights and of the images decides",
        "images": f"{dataset.count} of a {dataset.kind}, {dead} of them unreadable",
        "views": policy,
        "tokens": f"{header.grid[0]}x{header.grid[1]} a view, {header.dim} channels, {header.quantiser.name}",
        "attention": header.attention,
        "store": f"{header.store}, {len(commits)} of {header.shards} shards, {readable(size)}",
        "fidelity": ", ".join(f"{name} {value:.6g}" for name, value in figures.items()) or "not measured",
        "fingerprint": f"`{header.fingerprint}`",
    }
    return f"""---
license: {licence}
pretty_name: {teacher["name"]} features
task_categories:
- image-feature-extraction
size_categories:
- {category}
tags:
- mrmae-cache
---

# Features of {teacher["name"]}

Patch tokens and attention of a teacher, extracted once by `mrmae extract-teacher-features`.

{fact_table(facts)}

## To read it

{reading}
{_DEQUANTISED.get(header.quantiser.name, "")}{summary}

`mrmae pretrain cache.path=PATH` trains from it, and takes the URL of this folder as well.

## To verify it

Every record has a crc32c, and `commits/` holds the length and the xxh3-128 of every file. `mrmae verify-cache PATH`
compares all of them. The fingerprint is the sha256 of `cache.json` without it, in canonical JSON.
"""
