"""Images that can't be read, found before the first step: one policy for every command that reads images.

Extraction finds them as it decodes, and has a key for their share (`max_tombstones`). All other commands look first: up
to the same hundredth of a set is left out with a warning. More stop the command, which names those of all sets at once.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol, Self, TypeVar

import numpy as np
from accelerate.utils import gather_object
from numpy.typing import NDArray

from pipeline.data.decoding import decode
from pipeline.data.listing import spread
from pipeline.errors import DataError
from pipeline.processes import processes

log = logging.getLogger(__name__)

MAX_TOMBSTONES = 0.01  # share of a set that may be left out

_DECODED = 16  # of each set, spread over the whole, whatever their ends look like
_BLOCK = 256  # images that a thread looks at in one go
_SHOWN = 5  # images of a set that a message names
_JPEG, _PNG, _GIF, _RIFF = b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF"


class Images(Protocol):
    """Encoded images by index."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str: ...

    def read(self, index: int) -> bytes: ...

    def ends(self, index: int, size: int) -> tuple[int, bytes, bytes]:
        """Bytes of the file, and its first and last `size`. Raises DataError if it isn't there."""

    @property
    def is_noted_readable(self) -> bool:
        """Whether an earlier look found all of them readable, and they are as they were."""

    def note_readable(self) -> None:
        """Note for later starts that all of them are readable, if there is a place for it."""

    def select(self, indices: NDArray[np.int64]) -> Self: ...


I = TypeVar("I", bound=Images)  # noqa: E741 - images


def leave_unreadable_out(sets: Mapping[str, I]) -> list[I]:
    """The sets, by their keys in messages, without what can't be read.

    A file counts as whole if it is a JPEG, PNG, GIF or WebP and its end is there. All others are decoded, and so are a
    few of each set, for to decode all would take as long as an epoch. Processes share the work. Where a large set was
    found readable, it is noted beside its kept list, and later starts look no more.

    Raises:
        DataError: of a set, more than `MAX_TOMBSTONES` are empty, absent, cut off or no images; those of all sets are
            named in one line.
    """
    lost = {key: _unreadable(images) for key, images in sets.items()}
    described = {key: _describe(key, sets[key], faults) for key, faults in lost.items() if faults}
    if any(len(faults) > MAX_TOMBSTONES * len(sets[key]) for key, faults in lost.items()):
        raise DataError(f"{'; '.join(described.values())}: restore the files or take them away")
    for text in described.values():
        log.warning("%s: left out, as they are less than %g%%", text, 100 * MAX_TOMBSTONES)
    kept = []
    for key, images in sets.items():
        indices = np.setdiff1d(np.arange(len(images)), list(lost[key]))
        kept.append(images.select(indices) if lost[key] else images)
    return kept


class Named(Protocol):
    """Images that have names."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str: ...


def warn_of_unreadable(key: str, images: Named, faults: Mapping[int, str]) -> None:
    """Say which images can't be read, where a command goes on without them, however many they are."""
    if faults:
        log.warning("%s: there is no result for them", _describe(key, images, faults))


def _describe(key: str, images: Named, faults: Mapping[int, str]) -> str:
    shown = [f"{images.key(index)}: {faults[index]}" for index in sorted(faults)[:_SHOWN]]
    more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    return f"{len(faults)} of {len(images)} images of {key} can't be read ({'; '.join(shown + more)})"


def _unreadable(images: Images) -> dict[int, str]:
    """Index → why, for all processes."""
    state, count = processes(), len(images)
    if all(gather_object([images.is_noted_readable])):
        return {}
    decoded = frozenset(place * count // _DECODED for place in range(_DECODED))
    blocks = [range(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK)]
    share = blocks[state.process_index :: state.num_processes]
    found = spread(partial(_faults, images, decoded), share, f"{_BLOCK} images")
    every = dict(sorted(gather_object([fault for faults in found for fault in faults])))
    if not every and state.is_local_main_process:
        images.note_readable()
    return every


def _faults(images: Images, decoded: frozenset[int], indices: Sequence[int]) -> list[tuple[int, str]]:
    faults = []
    for index in indices:
        try:
            length, head, tail = images.ends(index, 32)
            if not length:
                faults.append((index, "it is empty"))
            elif index in decoded or not _is_whole(length, head, tail):
                decode(images.read(index))
        except DataError as error:
            faults.append((index, str(error).removeprefix(f"image {images.key(index)}: ")))
    return faults


def _is_whole(length: int, head: bytes, tail: bytes) -> bool:
    """Whether a file begins as one of four formats does, and ends so. Nothing inside is looked at."""
    if head.startswith(_JPEG):
        return b"\xff\xd9" in tail  # which compressed pixels never contain
    if head.startswith(_PNG):
        return b"IEND" in tail
    if head.startswith(_GIF):
        return tail.rstrip(b"\0").endswith(b";")
    return head.startswith(_RIFF) and int.from_bytes(head[4:8], "little") + 8 <= length
