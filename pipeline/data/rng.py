"""Counter-based random numbers: everything random about a sample is a function of named integers, never of a worker.

Philox's raw 64-bit output is fixed by its definition (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011), so a number drawn today is the number drawn after any upgrade of numpy.
"""

import threading
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Stream(IntEnum):
    """What the numbers are for: streams with the same seed and index stay independent."""

    VIEW = 1
    MASK = 2
    AUGMENT = 3
    ORDER = 4
    CHECK = 5
    PREDICT = 6


def raw_bits(count: int, stream: Stream, seed: int, *counters: int) -> NDArray[np.uint64]:
    """`count` uniform uint64, a function of (stream, seed, up to three counters)."""
    bits: NDArray[np.uint64] = raw_bits_of_each(count, stream, seed, (counters,))[0]
    return bits


def raw_bits_of_each(count: int, stream: Stream, seed: int, counters: Sequence[tuple[int, ...]]) -> NDArray[np.uint64]:
    """`raw_bits` for each of n tuples of counters, of one length: uint64 [n, count]."""
    generator, state = _generator()
    words, key = state["state"]["counter"], state["state"]["key"]
    # The lowest counter word is Philox's own: it steps through the `count` draws.
    words[:], key[:] = 0, (seed, stream)
    bits = np.empty((len(counters), count), np.uint64)
    for row, values in zip(bits, counters, strict=True):
        words[1 : 1 + len(values)] = values
        generator.state = state
        row[:] = generator.random_raw(count)
    return bits


_LOCAL = threading.local()


def _generator() -> tuple[np.random.Philox, Any]:
    """This thread's generator and the state of a new one: setting it takes a tenth of making another generator."""
    if not hasattr(_LOCAL, "pair"):
        generator = np.random.Philox(counter=0, key=0)
        _LOCAL.pair = generator, generator.state
    pair: tuple[np.random.Philox, Any] = _LOCAL.pair
    return pair


def uniforms(count: int, stream: Stream, seed: int, *counters: int) -> NDArray[np.float64]:
    """`count` float64 in (0, 1): the open interval, so that logarithms are finite."""
    return _open_unit(raw_bits(count, stream, seed, *counters))


def uniforms_of_each(count: int, stream: Stream, seed: int, counters: Sequence[tuple[int, ...]]) -> NDArray[np.float64]:
    """`uniforms` for each of n tuples of counters: float64 [n, count], at less than half the price."""
    return _open_unit(raw_bits_of_each(count, stream, seed, counters))


def _open_unit(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
