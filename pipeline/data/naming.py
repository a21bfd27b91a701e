"""What a file's name says: an image, a label, or something that is passed over. One rule for folders and for tars."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import features

from pipeline.errors import DataError

# Endings of the formats that decoding.py opens: always, and where Pillow was built with a feature.
_ALWAYS = {
    *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "bmp", "dib", "gif", "tif", "tiff"),
    *("ppm", "pgm", "pbm", "pnm", "pfm"),
}
_BY_FEATURE = {"jpg_2000": ("jp2", "j2k", "j2c", "jpc", "jpf", "jpx"), "avif": ("avif", "avifs")}

EXTENSIONS = frozenset(_ALWAYS).union(*(names for feature, names in _BY_FEATURE.items() if features.check(feature)))

IMAGE_ENDINGS = frozenset(extension.encode() for extension in EXTENSIONS)
SYSTEM_FOLDERS = frozenset({b"__MACOSX", b"@eaDir", b"$RECYCLE.BIN"})  # of macOS, Synology's disks and Windows
_WORD = re.compile(rb"(?=.*[a-z])[a-z0-9_-]{1,8}")
_SHOWN = 6

HIDDEN = "hidden"  # what is passed over counts as this, or by its ending


def is_hidden_path(path: bytes) -> bool:
    """Whether a part of a path is hidden: it begins with a dot, or is a folder of the system's own."""
    parts = path.split(b"/")
    return any((part.startswith(b".") and part not in (b".", b"..")) or part in SYSTEM_FOLDERS for part in parts)


def key_of(name: bytes) -> bytes:
    """WebDataset's key of a path: up to the first dot of the base name."""
    folder, slash, base = name.rpartition(b"/")
    return folder + slash + base.partition(b".")[0]


def describe_ending(ending: bytes) -> str:
    """What a passed-over file counts as. Numbers and long words behind a dot are part of a name, and count together."""
    if not ending:
        return "without an ending"
    return f".{ending.decode()}" if _WORD.fullmatch(ending) else "of other endings"


def companion(name: bytes) -> str:
    """What a picture such as KEY.seg.png counts as where KEY has an image."""
    return f".{name.rpartition(b'/')[2].partition(b'.')[2].decode(errors='replace')} beside an image"


def add_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sums of several counts, the largest first."""
    total: Counter[str] = Counter()
    for part in counts:
        total.update(part)
    return dict(total.most_common())


def show_counts(counts: Mapping[str, int]) -> str:
    """At most six reasons, as in "250 .heic, 12 hidden"."""
    shown = [f"{count:,} {reason}" for reason, count in list(counts.items())[:_SHOWN]]
    left = sum(list(counts.values())[_SHOWN:])
    return ", ".join([*shown, f"{left:,} others"] if left else shown)


def pack(names: list[bytes]) -> NDArray[np.bytes_]:
    """Names as one block of bytes.

    Raises:
        DataError: one of them is no UTF-8.
    """
    try:
        b"\0".join(names).decode()
    except UnicodeDecodeError as error:
        at = error.object[: error.start].count(b"\0")
        name = ascii(os.fsdecode(error.object.split(b"\0")[at]))
        raise DataError(
            f"data.path: the file name {name} is no UTF-8, as keys are: rename it, then run again"
        ) from error
    return np.array(names, dtype=np.bytes_)


def join(blocks: list[NDArray[np.bytes_]]) -> NDArray[np.bytes_]:
    """One array of all, as wide as the widest; the blocks are freed on the way."""
    width = max((block.dtype.itemsize for block in blocks), default=1)
    joined = np.empty(sum(map(len, blocks)), f"S{width}")
    place = 0
    blocks.reverse()
    while blocks:
        block = blocks.pop()
        joined[place : place + len(block)] = block
        place += len(block)
    return joined
