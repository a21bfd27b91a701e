"""Batches made in other processes: equal to those made here, in order, in memory that is used again."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from threading import Timer
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from pipeline.data import slots
from pipeline.data.slots import CAPACITY, Empty, Page, Slots, read_memory, unpack, write_memory
from pipeline.data.workers import PREFETCH, Pool
from pipeline.errors import ConfigError, DataError

ROOT = Path(__file__).parents[3]


@dataclass
class Batch:
    images: Tensor
    labels: Tensor
    nested: dict[str, tuple[Any, Any]]
    texts: list[bytes]


def make(number: int, empty: Empty) -> Batch:
    pixels = empty((4, 64, 64, 3), np.uint8)
    pixels[...] = number % 251
    return Batch(
        torch.from_numpy(pixels).permute(0, 3, 1, 2),
        torch.tensor([number, -number]),
        {
            "a": (torch.full((9000,), number, dtype=torch.float16), None),
            "b": (np.full((30, 300), number), torch.empty(0)),
        },
        [b"%d" % number],
    )


def check(batch: Batch, number: int) -> None:
    expected = make(number, np.empty)
    assert batch.images.stride() == expected.images.stride()
    assert torch.equal(batch.images, expected.images)
    assert torch.equal(batch.labels, expected.labels)
    assert torch.equal(batch.nested["a"][0], expected.nested["a"][0])
    assert (batch.nested["b"][0] == expected.nested["b"][0]).all()
    assert batch.nested["b"][1].dtype == torch.float32
    assert batch.texts == expected.texts


@pytest.fixture
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    pool = Pool(*getattr(request, "param", (make, 2)))
    yield pool
    pool.close()


@pytest.mark.parametrize(
    "pool",
    [(make, 1), (make, 3), (make, 2, 1 << 15)],
    ids=["one worker", "three workers", "small slots"],
    indirect=True,
)
@pytest.mark.parametrize("keep", [False, True])
def test_batches_come_whole_and_in_order_however_long_they_are_kept(pool: Pool, keep: bool) -> None:
    kept = []
    for number, batch in enumerate(pool.batches(range(60))):
        check(batch, number)
        if keep:
            kept.append(batch)
    assert number == 59
    for number, batch in enumerate(kept):
        check(batch, number)


def test_a_slot_is_used_again_when_its_last_view_is_gone() -> None:
    ring = Slots(1, 1 << 20)
    (slot,) = [ring.take()]
    assert slot == 0
    page = Page(ring.memory(slot))
    packed = page.pack(make(7, page.empty))
    assert packed is not None
    batch = ring.unpack(slot, packed)
    labels, row = batch.labels, batch.images[1]
    del batch
    assert ring.take() is None
    assert (row == 7).all()
    del row
    assert ring.take() == 0  # labels are small, so they are copies and keep nothing
    assert labels.tolist() == [7, -7]


def test_what_is_made_in_the_slot_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = np.zeros(1 << 20, np.uint8)
    page = Page(memory)
    put: list[int] = []
    original = Page._put
    monkeypatch.setattr(Page, "_put", lambda self, array: put.append(len(array)) or original(self, array))
    packed = page.pack(make(7, page.empty))
    assert packed is not None
    assert 4 * 64 * 64 * 3 not in put
    check(unpack(memory, packed), 7)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3),
        torch.tensor([3]).as_strided((1,), (0,)),  # torch calls any stride of a single number contiguous
        torch.tensor([7]).expand(5),
        torch.zeros(0, 4),
        torch.ones(2, 3, dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.arange(48.0).reshape(1, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.arange(12).reshape(3, 4).T,
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)} {tensor.dtype} {tensor.stride()}",
)
def test_any_tensor_is_handed_over(tensor: torch.Tensor) -> None:
    (found,) = read_memory(*write_memory([tensor]))
    assert found.dtype == tensor.dtype
    assert torch.equal(found, tensor)
    if tensor.ndim == 4:
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_nothing_of_it_has_a_name_in_shared_memory(pool: Pool) -> None:
    before = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm" in line}
    next(pool.batches(range(9)))
    after = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm" in line}
    assert after <= before


def test_a_worker_is_asked_for_no_more_than_its_share_ahead(pool: Pool) -> None:
    asked = iter(range(10**9))
    batches = pool.batches(asked)
    for _ in range(5):
        next(batches)
    assert next(asked) == 2 * PREFETCH + 5


class UnpicklableError(Exception):
    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


ERRORS = [DataError("image 3: unreadable"), KeyError("absent"), UnpicklableError(1, 2)]


def fail(number: int, _: Empty) -> int:
    if number < 5:
        return number
    raise ERRORS[number - 5]


@pytest.mark.parametrize("which", range(3))
def test_errors_arrive_as_themselves_in_their_turn(which: int) -> None:
    pool = Pool(fail, 2)
    batches = pool.batches([0, 1, 2, 5 + which, 3])
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    expected = (DataError, KeyError, RuntimeError)[which]
    with pytest.raises(expected, match=("unreadable", "absent", "UnpicklableError: 1 and 2")[which]) as caught:
        next(batches)
    assert "in a process that loads data:\nTraceback" in caught.value.__notes__[-1]
    pool.close()


def test_close_ends_a_worker_that_hangs_in_a_batch() -> None:
    pool = Pool(lambda *_: time.sleep(600), 2)
    batches = pool.batches(range(9))
    pids = [worker.pid for worker in pool._workers]
    assert pool._slots.take() is not None
    began = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - began < 5
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert next(batches, None) is None


@pytest.mark.parametrize("capacity", [CAPACITY, 1 << 12], ids=["slots", "memory of its own"])
def test_a_worker_that_is_killed_at_any_moment_is_said(capacity: int) -> None:
    random = Random(0)
    for _ in range(8):
        pool = Pool(make, 2, capacity)
        killing = Timer(random.uniform(0, 0.02), os.kill, (random.choice(pool._workers).pid, signal.SIGKILL))
        killing.start()
        with pytest.raises(ConfigError, match=r"^a process that loads data has ended \(SIGKILL\): where"):
            deque(pool.batches(count()), maxlen=1)
        killing.join()
        pool.close()


PROGRAM = """
import os, sys, time
from pipeline.data.workers import Pool
pool = Pool(lambda number, empty: number, 3)
other = Pool(lambda number, empty: number, 2)  # inherits the first one's sockets
batches = pool.batches(range(10**9))
next(batches)
print(*(worker.pid for worker in pool._workers + other._workers), flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["time.sleep(600)", "sys.exit(3)", "raise ValueError", "os._exit(4)"])
def test_workers_leave_with_the_process_that_trains(end: str) -> None:
    command = [sys.executable, "-c", PROGRAM.format(end=end)]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as owner:
        assert owner.stdout is not None
        workers = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(workers) == 5
        if "sleep" in end:
            assert all(psutil.pid_exists(pid) for pid in workers)
            owner.send_signal(signal.SIGKILL)
        owner.wait(timeout=60)
    deadline = time.monotonic() + 30
    while (left := [pid for pid in workers if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Event:
    def __init__(self) -> None:
        self.done, self.waited = False, 0

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.waited += not self.done
        self.done = True


class Cuda:
    """As much of CUDA as slots know."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.events: deque[Event] = deque()

    def cudaHostRegister(self, address: int, size: int, _flags: int) -> int:  # noqa: N802
        assert address not in self.pinned
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.pinned[address]
        return 0

    def record_event(self) -> Event:
        self.events.append(Event())
        return self.events[-1]


def test_a_slot_that_the_device_still_reads_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    stand_ins = {
        "is_available": lambda: True, "current_device": lambda: 0, "cudart": lambda: cuda,
        "current_stream": lambda _: cuda, "check_error": lambda _: None, "synchronize": lambda _: None,
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(slots.torch.cuda, name, stand_in)
    ring = Slots(2, 8 << 20)

    def batch(slot: int | None, rows: int) -> Any:
        assert slot is not None
        page = Page(ring.memory(slot))
        packed = page.pack(torch.from_numpy(page.empty((rows, 1 << 20), np.uint8)))
        assert packed is not None
        return ring.unpack(slot, packed)

    first, second = batch(ring.take(), 1), batch(ring.take(), 1)
    assert list(cuda.pinned.values()) == [2 << 20, 2 << 20]
    assert ring.take() is None  # both are kept
    del first
    gc.collect()
    (event,) = cuda.events
    assert not event.done
    slot = ring.take()  # nothing else is free: it waits for the copy
    assert event.waited == 1
    larger = batch(slot, 3)
    assert sorted(cuda.pinned.values()) == [2 << 20, 4 << 20]
    del second, larger
    cuda.events[-1].done = cuda.events[-2].done = True
    assert {ring.take(), ring.take()} == {0, 1}
    assert sum(event.waited for event in cuda.events) == 1
    ring.close()
    assert not cuda.pinned
