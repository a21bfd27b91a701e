"""Processes that make batches, forked from the one that trains on them, and what ends them.

Requests go round: batch n is made by worker n modulo their number, so batches come in order by asking each worker in
its turn. A request and its answer are a few bytes in a socket; the batch itself lies in a slot (see slots.py).

A worker leaves when its socket is closed, which the kernel does when the process that trains has ended in whatever
way. `Pool.close` doesn't wait for that: workers only read, so they are killed.
"""

import atexit
import gc
import os
import pickle
import signal
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain, cycle
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, NoReturn
from weakref import WeakSet

import numpy as np
import torch

from pipeline.data.slots import CAPACITY, Empty, Page, Slots, read_memory, write_memory
from pipeline.errors import ConfigError

PREFETCH = 4  # batches that a worker is asked for ahead
_SLOTS = 8  # a worker's: those asked for, and those that training still uses
_PATIENCE = 5.0  # seconds that a killed worker may need to leave: one that waits for a dead disk can't

Make = Callable[[Any, Empty], Any]  # (request, what gives arrays) → batch


class _Worker:
    """One process, and this end of the socket to it."""

    def __init__(self) -> None:
        self.socket, self.far_end = Pipe()
        self.pid = 0

    def ended(self) -> NoReturn:
        """Raise what there is to say of a worker that is gone."""
        raise ConfigError(
            f"a process that loads data has ended ({self._how()}): where memory is full, the kernel kills it; lower "
            "data.workers or batch_size, or give the job more memory"
        )

    def _how(self) -> str:
        with suppress(ChildProcessError):
            for _ in _until(_PATIENCE):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.pid = 0
                    code = os.waitstatus_to_exitcode(status)
                    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return "its socket is closed"


class Pool:
    """Workers that make batches of requests.

    Args:
        make: (request, empty) → batch; arrays that it takes from `empty` are made where they are handed over.
        workers: how many processes, at least one.
        capacity: bytes of a slot; a larger batch is handed over too, in memory of its own.
    """

    def __init__(self, make: Make, workers: int, capacity: int = CAPACITY) -> None:
        self._owner = os.getpid()
        self._slots = Slots(workers * _SLOTS, capacity)
        self._workers: list[_Worker] = []
        _pools.add(self)
        try:
            for _ in range(workers):
                self._workers.append(worker := _Worker())
                worker.pid = _fork()
                if not worker.pid:
                    _serve(worker.far_end, make, self._slots)
                worker.far_end.close()
        except OSError as error:
            self.close()
            raise ConfigError(f"data.workers={workers}: {error.strerror}; lower data.workers") from error

    def batches(self, requests: Iterable[Any]) -> Iterator[Any]:
        """A batch for each request, in their order.

        Raises:
            Exception: what `make` raised in a worker, as itself.
            ConfigError: a worker has ended.
        """
        asked: deque[tuple[_Worker, int | None]] = deque()
        turns, stream = cycle(self._workers), iter(requests)

        def ask() -> None:
            for request in stream:
                worker, slot = next(turns), self._slots.take()
                asked.append((worker, slot))
                with suppress(BrokenPipeError, ConnectionResetError):  # its turn to answer will say so
                    worker.socket.send((request, slot))
                return

        for _ in range(PREFETCH * len(self._workers)):
            ask()
        while asked:
            batch = self._answer(*asked.popleft())
            ask()
            yield batch

    def close(self) -> None:
        """End the workers, in the middle of a batch if need be. No batch comes after that; those that are out stay."""
        if os.getpid() != self._owner:
            return  # forked from the owner: its workers are not this process's to end
        for worker in self._workers:
            worker.socket.close()
            if worker.pid:
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)
        for worker in self._workers:
            _reap(worker)
        self._workers.clear()
        self._slots.close()

    def _answer(self, worker: _Worker, slot: int | None) -> Any:
        try:
            kind, answer = worker.socket.recv()
            if kind == "memory":
                file = recv_handle(worker.socket)
        except (EOFError, OSError):
            worker.ended()
        if kind == "slot":
            assert slot is not None
            return self._slots.unpack(slot, answer)
        if slot is not None:
            self._slots.give_back(slot)
        if kind == "error":
            raise answer
        return read_memory(file, answer)

    def _leave_to_owner(self) -> None:
        """In a process just forked: the sockets are the owner's alone, or a worker would never see them closed."""
        for worker in self._workers:
            worker.socket.close()


_pools: WeakSet[Pool] = WeakSet()


@atexit.register
def _close_all() -> None:
    for pool in list(_pools):
        pool.close()


def _leave_all() -> None:
    for pool in list(_pools):
        pool._leave_to_owner()


os.register_at_fork(after_in_child=_leave_all)


def _fork() -> int:
    with warnings.catch_warnings():
        # Python 3.12 warns where there are threads. A worker takes no lock that one of them might hold: it reads,
        # decodes and copies.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        return os.fork()


def _serve(socket: Connection, make: Make, slots: Slots) -> NoReturn:
    """What a worker does until its socket is closed."""
    code = 1
    try:
        _settle()
        with suppress(EOFError, BrokenPipeError, ConnectionResetError):
            while True:
                _answer(socket, make, slots)
        code = 0
    finally:
        os._exit(code)  # nothing of the owner's is flushed, finished or joined here


def _settle() -> None:
    """One thread, and deaf to the signals that a terminal or a scheduler sends to the whole process group.

    The owner answers those, and wants its batches until it has saved.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    gc.freeze()  # or a collection would write to every page of the owner's objects, and so copy it


def _answer(socket: Connection, make: Make, slots: Slots) -> None:
    request, slot = socket.recv()
    page = None if slot is None else Page(slots.memory(slot))
    file: int | None = None
    try:
        batch = make(request, np.empty if page is None else page.empty)
        packed = None if page is None else page.pack(batch)
        if packed is None:
            file, packed = write_memory(batch)
    except Exception as error:  # noqa: BLE001 - the owner raises it
        socket.send(("error", _portable(error)))
        return
    socket.send(("slot" if file is None else "memory", packed))
    if file is not None:
        send_handle(socket, file, None)
        os.close(file)


def _portable(error: Exception) -> Exception:
    """The error, with its traceback as a note; another one that says the same, where it can't be pickled."""
    error.add_note(f"in a process that loads data:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - written in this line
    except Exception:  # noqa: BLE001 - whatever its class does wrong
        portable = RuntimeError(f"{type(error).__name__}: {error}")
        portable.add_note(error.__notes__[-1])
        return portable
    return error


def _reap(worker: _Worker) -> None:
    """Wait for a killed worker."""
    with suppress(ChildProcessError):
        for _ in _until(_PATIENCE):
            if not worker.pid or os.waitpid(worker.pid, os.WNOHANG)[0]:
                return


def _until(seconds: float) -> Iterator[None]:
    """Turns of a loop that looks for something, a millisecond apart."""
    deadline = time.monotonic() + seconds
    for pause in chain((0.0,), cycle((0.001,))):
        time.sleep(pause)
        yield
        if time.monotonic() > deadline:
            return
