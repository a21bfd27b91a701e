"""Tasks that run side by side on one machine, each with its share of the CPU cores and with a GPU."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from queue import SimpleQueue
from threading import Event
from typing import TypeVar

import torch

T = TypeVar("T")
Environment = Mapping[str, str]  # variables that differ from this process's


def run_jobs(tasks: Sequence[Callable[[Environment], T]], jobs: int) -> Iterator[tuple[int, T]]:
    """(number, result) of each task as it ends, `jobs` of them at once, in threads.

    Once a task has failed no other begins; its error is raised when those in hand have ended.
    """
    jobs = max(1, min(jobs, len(tasks)))
    places, stopped = SimpleQueue[Environment](), Event()
    for environment in environments(jobs):
        places.put(environment)

    def work(task: Callable[[Environment], T]) -> T:
        if stopped.is_set():
            raise CancelledError
        environment = places.get()
        try:
            return task(environment)
        except BaseException:
            stopped.set()
            raise
        finally:
            places.put(environment)

    with ThreadPoolExecutor(jobs) as pool:
        numbers = {pool.submit(work, task): number for number, task in enumerate(tasks)}
        try:
            for future in as_completed(numbers):
                if not isinstance(future.exception(), CancelledError):
                    yield numbers[future], future.result()
        except BaseException:
            stopped.set()
            raise


def environments(jobs: int) -> list[Environment]:
    """The environment of each place: GPUs in turn, and an even share of the cores. A single job has the machine."""
    if jobs == 1:
        return [{}]
    gpus = _gpus()
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(_threads(jobs))}
    return [threads | ({"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else {}) for place in range(jobs)]


def _threads(jobs: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // jobs)


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]
