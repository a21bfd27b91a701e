"""How large a cache will be, before anything is written."""

import re
import shutil
from pathlib import Path

import numpy as np

from pipeline.cache.format.header import AttentionKind, StoreName
from pipeline.errors import CacheError

JPEG_BYTES = 25_000  # of a photo at 224 px, quality 95
_MARGIN = 1.02  # of free room over what is estimated
_KEY_BYTES = 40  # a class, a file name, and their length
_TAR_BYTES = 3 * 512 + 512 + 2 * 256 + 200  # headers, JSON, padding on average, the safetensors header
_ITEM = {"int8": 1, "float16": 2, "float32": 4}


def estimate_bytes(
    tokens: int, dim: int, store: StoreName, quantiser: str, attention: AttentionKind, heads: int
) -> int:
    """Bytes of a view in a cache, within a few percent; the size of a stored JPEG is an assumption.

    Args:
        tokens, dim: L and D of the teacher.
        attention, heads: as in `CacheHeader`.
    """
    record = tokens * dim * _ITEM[quantiser]
    record += 2 * tokens * (quantiser == "int8")
    record += 2 * tokens * {"mean": 1, "heads": heads, "none": 0}[attention]
    return record + (25 + _KEY_BYTES + 8 if store == "zarr" else JPEG_BYTES + _TAR_BYTES)


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
            "choose another disk, fewer views, or the int8 quantiser"
        )


def parse_bytes(text: object) -> object:
    """Bytes of a text in decimal units, such as 50GB; anything else stays as it is."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?)B?", text) if isinstance(text, str) else None
    return int(float(match[1]) * 1000 ** " kMGT".index(match[2] or " ")) if match else text


def readable(size: float) -> str:
    """Bytes in decimal units, three digits: 193.9 GB."""
    power = 0 if size < 1 else min(int(np.log10(size) // 3), 5)
    return f"{size / 1000**power:.4g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"
