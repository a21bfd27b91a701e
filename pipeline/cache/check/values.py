"""Values that no extraction writes: records whose checksum is right and whose content can't be."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.format.quantiser import Quantiser
from pipeline.cache.format.records import TAILS, Raw

_SUM_TOLERANCE = 5e-3  # of attention over tokens: float16 rounds each of them


class ViewContent:
    """The sound records of one view of one shard, without their tokens."""

    def __init__(self, quantiser: Quantiser) -> None:
        self._quantiser = quantiser
        self.rows: list[int] = []
        self.keys: list[bytes] = []  # UTF-8
        self._tails: list[bytes] = []
        self._scale: list[NDArray[np.float16]] = []
        self._attention: list[NDArray[np.float16]] = []
        self._unsound: list[bool] = []  # whether a token is not finite, or of no cluster

    def add(self, row: int, record: Raw) -> None:
        """Copy what is kept of a record."""
        self.rows.append(row)
        self.keys.append(record.key)
        self._tails.append(record.tail)
        self._unsound.append(not self._quantiser.sound(record.tokens))
        if record.scale is not None:
            self._scale.append(record.scale.copy())
        if record.attention is not None:
            self._attention.append(record.attention.copy())

    @property
    def tails(self) -> NDArray[Any]:
        """Box, hflip and source hash: [n] of TAILS."""
        return np.frombuffer(b"".join(self._tails), TAILS)

    def impossible(self) -> Iterator[tuple[str, NDArray[np.int64]]]:
        """What is wrong, and the rows where it is."""
        box, hflip = self.tails["box"], self.tails["hflip"]
        unsound = "tokens are of no cluster of the codebook" if self._quantiser.clusters else "tokens are not finite"
        wrong: dict[str, Any] = {unsound: np.array(self._unsound, bool)}
        if self._scale:
            # As integers, float16 from the smallest above 0 to the largest are 1 to 0x7BFF.
            bits = np.stack(self._scale).view(np.uint16)
            wrong["scales are not finite and positive"] = (bits - np.uint16(1)).max(1) >= 0x7BFF
        if self._attention:
            wrong |= _impossible_attention(np.stack(self._attention))
        wrong["the box is empty or outside the image"] = (box[:, :2] < 0).any(1) | (box[:, 2:] < 1).any(1)
        wrong["hflip is neither 0 nor 1"] = hflip > 1
        rows = np.array(self.rows, np.int64)
        yield from ((problem, rows[where]) for problem, where in wrong.items() if where.any())


def _impossible_attention(attention: NDArray[np.float16]) -> dict[str, NDArray[np.bool_]]:
    """Attention [n, L] or [n, H, L] → what is wrong, and where: [n]."""
    # As integers, float16 up to 0x8000 are those that are not negative.
    positive = attention.view(np.uint16).max(-1) <= 0x8000
    with np.errstate(invalid="ignore"):  # infinite values of both signs
        sums = attention.astype(np.float32).sum(-1)  # [n] or [n, H]
    good = positive & (sums <= 1 + _SUM_TOLERANCE)
    if sums.ndim > 1:
        # A head's row is as the teacher has it, less what it gives to prefix tokens; not all give them everything.
        return {"a head's attention sums to more than 1, or all heads' to 0": ~good.all(1) | (sums.max(1) <= 0)}
    return {"attention does not sum to 1": ~(good & (sums >= 1 - _SUM_TOLERANCE))}
