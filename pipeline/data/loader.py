"""Batches by step: which samples, which views, which masks, all functions of (seed, epoch, index) alone.

A global batch is fixed by the config; each process takes its slice. So the stream of samples depends on neither the
number of processes nor of workers, and a run resumes by asking for the batches from its step on.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from pipeline.data.order import EpochOrder
from pipeline.data.slots import Empty
from pipeline.data.workers import Pool
from pipeline.ownership import closed_with_stage
from pipeline.steps import StepPlan

Request = tuple[int, int]  # (epoch, sample index)
_LOOK_AHEAD = 4096  # samples: an order gives thousands at once for the price of a few
B_co = TypeVar("B_co", covariant=True)
B = TypeVar("B")


class IndexedDataset(Protocol[B_co]):
    """Makes one micro-batch of what a list of requests names; large arrays best in what `empty` gives."""

    def __getitems__(self, requests: list[Request], empty: Empty = np.empty) -> B_co: ...


def step_requests(order: EpochOrder, plan: StepPlan, start_step: int) -> Iterator[list[Request]]:
    """The requests of this process, micro-batch by micro-batch, from `start_step` to the end of the plan."""
    share = plan.images_per_step // plan.processes
    step = start_step
    while step < plan.total_steps:
        epoch, step_of_epoch = divmod(step, plan.steps_per_epoch)
        steps = min(max(1, _LOOK_AHEAD // share), plan.steps_per_epoch - step_of_epoch, plan.total_steps - step)
        firsts = np.arange(step_of_epoch, step_of_epoch + steps) * plan.images_per_step + plan.rank * share
        places = (firsts[:, None] + np.arange(share)).ravel()
        for indices in order.take(epoch, places).reshape(steps * plan.accum_iter, -1).tolist():
            yield [(epoch, index) for index in indices]
        step += steps


@dataclass(frozen=True)
class Samples(Generic[B]):
    """What a run shows its model, step by step."""

    dataset: IndexedDataset[B]
    order: EpochOrder
    workers: int
    announce: Callable[[Iterator[list[Request]]], Iterator[list[Request]]] = iter  # sees requests as they are made

    def batches(self, plan: StepPlan, start_step: int) -> Generator[B, None, None]:
        """This process's micro-batches from `start_step` on."""
        return load(self.dataset, self.announce(step_requests(self.order, plan, start_step)), self.workers)


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


def load_in_order(
    dataset: IndexedDataset[B], indices: Sequence[int], batch_size: int, workers: int
) -> Generator[B, None, None]:
    """Each of these samples once, the last batch as short as it is; see `load`."""
    starts = range(0, len(indices), batch_size)
    return load(dataset, [[(0, index) for index in indices[start : start + batch_size]] for start in starts], workers)
