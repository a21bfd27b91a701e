"""Our chunk files are, byte for byte, those that zarr's own API writes."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from pipeline.cache.zarr.view import array_specs
from tests.test_pipeline.cache.samples import make_cache, make_header, make_shard


@pytest.mark.parametrize("attention", ["mean", "heads", "none"])
@pytest.mark.parametrize("quantiser", ["int8", "int4", "codes", "float16", "float32"])
def test_chunks_are_those_of_zarr(tmp_path: Path, quantiser: str, attention: str) -> None:
    """10 samples in shards of 4: the last chunk is padded. Sample 5 is a tombstone, its rows zero."""
    header = make_header(quantiser_name=quantiser, attention=attention, heads=3)
    ours = make_cache(tmp_path / "ours", header, {5: "bad"})
    theirs = tmp_path / "theirs"
    shutil.copytree(ours, theirs, ignore=lambda _, names: {name for name in names if name.startswith("c.")})
    arrays: dict[str, Any] = {name: zarr.open_group(ours, mode="r")[name] for name in array_specs(header)}
    for name, array in arrays.items():
        target: Any = zarr.open_group(theirs, mode="r+")[name]
        target = target.with_config({"write_empty_chunks": True})
        for shard in range(header.shards):
            span = header.shard_range(shard)
            target[span.start : span.stop] = array[span.start : span.stop]
    files = sorted(path.relative_to(ours) for path in ours.rglob("c.*"))
    assert files == sorted(path.relative_to(theirs) for path in theirs.rglob("c.*"))
    assert len(files) == 3 * (2 * (len(arrays) - 2) + 2)
    for file in files:
        assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file
    for shard in range(header.shards):
        span, data = header.shard_range(shard), make_shard(header, shard, {5: "bad"})
        live = [row for row, index in enumerate(span) if index != 5]
        np.testing.assert_array_equal(arrays["tokens"][span.start : span.stop][live], data.tokens[live])
