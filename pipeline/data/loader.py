"""Batches by step: which samples, which views, which masks, all functions of (seed, epoch, index) alone.

A global batch is fixed by the config; each process takes its slice. So the stream of samples depends on neither the
number of processes nor of workers, and a run resumes by starting the sampler at its step.
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from pipeline.data.order import EpochOrder
from pipeline.data.slots import Empty
from pipeline.data.workers import Pool
from pipeline.ownership import closed_with_stage

Request = tuple[int, int]  # (epoch, sample index)
_LOOK_AHEAD = 4096  # samples: an order gives thousands at once for the price of a few
B_co = TypeVar("B_co", covariant=True)
B = TypeVar("B")


class IndexedDataset(Protocol[B_co]):
    """Makes one micro-batch of what a list of requests names; large arrays best in what `empty` gives."""

    def __getitems__(self, requests: list[Request], empty: Empty = np.empty) -> B_co: ...


@dataclass(frozen=True)
class StepSampler:
    """The requests of one process, micro-batch by micro-batch, from `start_step` to `total_steps`."""

    order: EpochOrder
    images_per_step: int  # over all processes
    accum_iter: int
    rank: int
    processes: int
    start_step: int
    total_steps: int

    def __iter__(self) -> Iterator[list[Request]]:
        steps_per_epoch = len(self.order) // self.images_per_step
        share = self.images_per_step // self.processes
        step = self.start_step
        while step < self.total_steps:
            epoch, place = divmod(step, steps_per_epoch)
            ahead = min(max(1, _LOOK_AHEAD // share), steps_per_epoch - place, self.total_steps - step)
            firsts = np.arange(place, place + ahead) * self.images_per_step + self.rank * share
            mine = self.order.take(epoch, (firsts[:, None] + np.arange(share)).ravel())
            for micro in mine.reshape(ahead * self.accum_iter, -1).tolist():
                yield [(epoch, index) for index in micro]
            step += ahead


def load(dataset: IndexedDataset[B], requests: Iterable[list[Request]], workers: int) -> Generator[B, None, None]:
    """Run the dataset over the requests in `workers` processes (0: in this one), in order.

    The processes end with the batches, with the iterator, or with the stage that runs (see `pipeline.ownership.stage`).

    Raises:
        Exception: whatever the dataset raised, from a worker as from here.
        ConfigError: a worker has ended, as for want of memory.
    """
    if not workers:
        yield from map(dataset.__getitems__, requests)
        return
    with closing(closed_with_stage(Pool(dataset.__getitems__, workers))) as pool:
        yield from pool.batches(requests)
