"""The order of an epoch: a keyed permutation with O(1) memory and O(1) seek, so that a resumed run starts where it was.

`full` permutes all samples with a Feistel network and cycle walking (Black and Rogaway, "Ciphers with arbitrary finite
domains", CT-RSA 2002). `block` permutes shards and shuffles inside a window of them, for disks that hate random reads.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.configs.data import OrderKind
from pipeline.data.rng import Stream, raw_bits

_ROUNDS = 8
_SHUFFLE_BELOW = 64  # a Feistel network over so few points is visibly not random


@dataclass(frozen=True)
class Permutation:
    """A random bijection of range(n), keyed by (seed, counters): call it on int64 positions."""

    n: int
    keys: NDArray[np.uint64]
    table: NDArray[np.int64] | None

    @classmethod
    def keyed(cls, n: int, seed: int, *counters: int) -> "Permutation":
        if n < _SHUFFLE_BELOW:
            table = np.argsort(raw_bits(max(n, 1), Stream.ORDER, seed, *counters)[:n], kind="stable")
            return cls(n, np.empty(0, np.uint64), table)
        return cls(n, raw_bits(_ROUNDS, Stream.ORDER, seed, *counters), None)

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        if self.table is not None:
            return np.take(self.table, positions)
        half = np.uint64(((self.n - 1).bit_length() + 1) // 2)
        x = self._feistel(positions.astype(np.uint64), half)
        # Cycle walking: the network permutes the power of four above n; walk on until inside (< 4 steps on average).
        while (outside := x >= self.n).any():
            x[outside] = self._feistel(x[outside], half)
        return x.astype(np.int64)

    def _feistel(self, x: NDArray[np.uint64], half: np.uint64) -> NDArray[np.uint64]:
        mask = (np.uint64(1) << half) - np.uint64(1)
        left, right = x >> half, x & mask
        for key in self.keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << half) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class EpochOrder:
    """The sequence of sample indices of every epoch: `order.take(epoch, positions)`.

    Args:
        live: int64, the samples that exist (tombstones taken out), ascending.
        seed: of the order alone.
        kind: "full" or "block".
        block_size: samples per shard, for "block".
        window: how many shards are shuffled together, for "block".
    """

    def __init__(
        self, live: NDArray[np.int64], seed: int, kind: OrderKind = "full", block_size: int = 1024, window: int = 16
    ) -> None:
        self.live, self.seed, self.kind, self.window = live, seed, kind, window
        shards = live // block_size
        self.block_size = block_size
        self._starts = np.flatnonzero(np.diff(shards, prepend=-1)) if len(live) else np.empty(0, np.int64)
        self._epoch: int | None = None

    def __len__(self) -> int:
        return len(self.live)

    def take(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample indices int64 [n] at ascending positions int64 [n] of the epoch; many cost little more than one."""
        self._enter(epoch)
        if self.kind == "full":
            return self.live[self._permutation(positions)]
        places: NDArray[np.int64] = np.concatenate(
            [self._in_window(positions, number) for number in self._windows(positions)]
        )
        return self.live[places]

    def windows(self, epoch: int, index: int, count: int) -> list[list[int]]:
        """The shards of `count` windows, from the one of this epoch that shows sample `index` on, into the next epoch.

        A full order has one window, all shards.
        """
        numbers = self.live[self._starts] // self.block_size
        if self.kind == "full":
            return [numbers.tolist()]
        self._enter(epoch)
        rank = np.searchsorted(numbers, index // self.block_size)
        first = int(np.flatnonzero(self._shards == rank)[0]) // self.window * self.window
        shards = self._shards[first:]
        windows = [shards[start : start + self.window] for start in range(0, len(shards), self.window)]
        if len(windows) < count:
            self._enter(epoch + 1)
            windows += [self._shards[start : start + self.window] for start in range(0, len(numbers), self.window)]
        return [numbers[window].tolist() for window in windows[:count]]

    def _enter(self, epoch: int) -> None:
        if self._epoch == epoch:
            return
        self._epoch = epoch
        self._permutation = Permutation.keyed(len(self.live), self.seed, epoch, 0)
        if self.kind == "block":
            counts = np.diff(np.append(self._starts, len(self.live)))
            self._shards = Permutation.keyed(len(counts), self.seed, epoch, 1)(np.arange(len(counts)))
            self._ends = np.cumsum(counts[self._shards])[self.window - 1 :: self.window]
            if len(self._ends) * self.window < len(counts):
                self._ends = np.append(self._ends, len(self.live))

    def _windows(self, positions: NDArray[np.int64]) -> range:
        first, last = np.searchsorted(self._ends, positions[[0, -1]], side="right")
        return range(int(first), int(last) + 1)

    def _in_window(self, positions: NDArray[np.int64], number: int) -> NDArray[np.int64]:
        """Positions of one window → places in `live`."""
        assert self._epoch is not None
        begin = int(self._ends[number - 1]) if number else 0
        end = int(self._ends[number])
        inside = positions[(positions >= begin) & (positions < end)] - begin
        shards = self._shards[number * self.window : (number + 1) * self.window]
        limits = np.append(self._starts, len(self.live))
        places = np.concatenate([np.arange(limits[s], limits[s + 1]) for s in shards])
        return places[Permutation.keyed(end - begin, self.seed, self._epoch, 2 + number)(inside)]
