"""How large a cache will be, before anything is written."""

import math
import shutil
from pathlib import Path

import numpy as np

from pipeline.cache.format.quantiser import Quantiser
from pipeline.configs.cache import StoreName
from pipeline.errors import CacheError

JPEG_BYTES = 25_000  # of a photo at 224 px, quality 95
_MARGIN = 1.02  # of free room over what is estimated
_KEY_BYTES = 40  # a class, a file name, and their length
_BLOCK = 512  # of a tar
_TAR_BYTES = 4 * _BLOCK + _BLOCK // 2  # headers and JSON; padding of the JPEG on average
_TENSOR_HEAD = 200  # the safetensors header


def estimate_bytes(rows: int, dim: int, store: StoreName, quantiser: str, attention: int) -> int:
    """Bytes of a view in a cache, within a few percent; the size of a stored JPEG is an assumption.

    Args:
        rows, dim: stored rows (patches, and the summary if there is one) and their channels.
        attention: attention values of a view.
    """
    stored = Quantiser(quantiser)
    record = rows * stored.width(dim) * stored.dtype.itemsize
    record += 2 * rows * stored.has_scale
    record += 2 * attention
    if store == "zarr":
        return record + 25 + _KEY_BYTES + 8
    return JPEG_BYTES + _TAR_BYTES + math.ceil((record + _TENSOR_HEAD) / _BLOCK) * _BLOCK


def require_room(path: Path, needed: int) -> None:
    """Check that the disk of `path`, which need not exist yet, has room for `needed` bytes.

    Raises:
        CacheError: stating both sizes.
    """
    existing = next(folder for folder in [path, *path.absolute().parents] if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed * _MARGIN > free:
        raise CacheError(
            f"{path} needs about {readable(needed)} and its disk has {readable(free)} free: "
            "choose another disk, fewer views, or the int8, int4 or codes quantiser"
        )


def readable(size: float) -> str:
    """Bytes in decimal units, three digits: 193.9 GB."""
    power = 0 if size < 1 else min(int(np.log10(size) // 3), 5)
    return f"{size / 1000**power:.4g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"
