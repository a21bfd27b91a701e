"""Memory that a process which makes batches shares with the one that trains on them.

A slot is room for one batch. All slots lie in one anonymous mapping that is made before the workers are forked and is
used again and again: it has no name in /dev/shm, no limit but the machine's memory, and nothing of it can be left over.
Its capacity is virtual; only pages that were written to take memory. A batch is handed out as views of its slot, and
the slot is free again when the last of them is gone, so nobody has to say how long a batch is kept.
"""

import mmap
import os
import pickle
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from pipeline.errors import ConfigError

Empty = Callable[[tuple[int, ...], DTypeLike], NDArray[Any]]  # np.empty, or the same in shared memory

CAPACITY = 1 << 30  # bytes of a slot, virtual: 5,000 images of pre-training at 224 px
_ALIGNMENT = 64  # bytes: a cache line
_SMALL = 1 << 14  # bytes: what is smaller is copied, so that labels kept by somebody don't keep a batch's pixels


class Packed(NamedTuple):
    """Where in a block of memory a batch lies: the bytes of its arrays, and what puts them together again."""

    arrays: list[tuple[int, int]]  # (start, stop)
    frame: tuple[int, int]

    @property
    def size(self) -> int:
        return self.frame[1]


class Page:
    """A slot while a batch is made in it: gives arrays, and packs the batch around them."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self._memory, self._used = memory, 0
        self._base = memory.ctypes.data

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """As np.empty, in the slot while it has room."""
        kind = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        if not size or _aligned(self._used) + size > len(self._memory):
            return np.empty(shape, kind)
        start = self._take(size)
        return self._memory[start : start + size].view(kind).reshape(shape)

    def pack(self, batch: Any) -> Packed | None:
        """Put what is not in the slot yet beside what is; None where it has no room for all of it."""
        frame, arrays = _split(batch)
        places = [self._place_of(array) for array in arrays]
        missing = [len(array) for array, place in zip(arrays, places, strict=True) if place is None]
        if self._used + sum(size + _ALIGNMENT for size in (*missing, len(frame))) > len(self._memory):
            return None
        spans = [
            (start := self._put(array) if place is None else place, start + len(array))
            for array, place in zip(arrays, places, strict=True)
        ]
        start = self._put(np.frombuffer(frame, np.uint8))
        return Packed(spans, (start, start + len(frame)))

    def _put(self, array: NDArray[np.uint8]) -> int:
        start = self._take(len(array))
        self._memory[start : start + len(array)] = array
        return start

    def _take(self, size: int) -> int:
        start = _aligned(self._used)
        self._used = start + size
        return start

    def _place_of(self, array: NDArray[np.uint8]) -> int | None:
        start = array.ctypes.data - self._base
        return start if 0 <= start < len(self._memory) else None


def unpack(memory: NDArray[np.uint8], packed: Packed) -> Any:
    """The batch, its large arrays as views of `memory` [bytes]."""
    view = memoryview(memory)  # type: ignore[arg-type]
    start, stop = packed.frame
    # Written by a process that this one has forked: no file, nobody else's bytes.
    return pickle.loads(view[start:stop], buffers=[view[a:b] for a, b in packed.arrays])  # noqa: S301


def write_memory(batch: Any) -> tuple[int, Packed]:
    """A batch in nameless memory of its own, as a file descriptor: for one that has no slot, or needs more than one.

    Raises:
        ConfigError: there is no memory left.
    """
    frame, arrays = _split(batch)
    spans = []
    try:
        with os.fdopen(os.memfd_create("mrmae"), "wb") as out:
            for array in (*arrays, np.frombuffer(frame, np.uint8)):
                start = _aligned(out.tell())
                out.seek(start)
                out.write(array.data)
                spans.append((start, start + len(array)))
            out.flush()
            file = os.dup(out.fileno())
    except OSError as error:
        raise ConfigError("no memory is left to hand a batch over: lower data.workers or batch_size") from error
    return file, Packed(spans[:-1], spans[-1])


def read_memory(file: int, packed: Packed) -> Any:
    """The batch that `write_memory` wrote, copied into memory of this process alone; closes the file."""
    memory = np.empty(packed.size, np.uint8)
    with os.fdopen(file, "rb") as content:
        content.seek(0)
        content.readinto(memory.data)
    return unpack(memory, packed)


class Slots:
    """The slots, as the process that trains sees them."""

    def __init__(self, count: int, capacity: int) -> None:
        self._capacity = capacity
        file = os.memfd_create("mrmae")
        try:
            os.ftruncate(file, count * capacity)
            self._mapping = mmap.mmap(file, count * capacity)
        finally:
            os.close(file)
        # The one that was freed last is taken first: its pages are there, and perhaps still in the CPU's cache.
        self._free = list(range(count))
        self._pins = _Pins() if torch.cuda.is_available() else None

    def memory(self, slot: int) -> NDArray[np.uint8]:
        return np.frombuffer(self._mapping, np.uint8, self._capacity, slot * self._capacity)

    def take(self) -> int | None:
        """A slot that nobody uses; None where batches that somebody keeps lie in all of them."""
        if self._pins is not None:
            self._free += self._pins.copied(wait=not self._free)
        return self._free.pop() if self._free else None

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

    def unpack(self, slot: int, packed: Packed) -> Any:
        """The batch as views of the slot, which is free again when they are gone and copied to the device."""
        memory = self.memory(slot)
        give_back = self._free.append
        if self._pins is not None:
            self._pins.pin(slot, memory, packed.size)
            give_back = self._pins.release
        weakref.finalize(memory, give_back, slot).atexit = False
        return unpack(memory, packed)

    def close(self) -> None:
        if self._pins is not None:
            self._pins.close()


class _Pins:
    """Slots as CUDA knows them: their pages are registered once, and copied from while the host goes on.

    So a slot whose batch is gone may still be read by the device. An event on the training stream says when that is
    over: what copies on another stream lets the training stream wait for it before it drops the batch (see
    pipeline/training/ahead.py).
    """

    def __init__(self) -> None:
        self._device = torch.cuda.current_device()
        self._pinned: dict[int, tuple[int, int]] = {}  # slot → (address, bytes)
        self._released: deque[tuple[int, torch.cuda.Event]] = deque()

    def pin(self, slot: int, memory: NDArray[np.uint8], size: int) -> None:
        """Register the bytes that batches take, anew where one takes more than those before it."""
        address, pinned = self._pinned.get(slot, (memory.ctypes.data, 0))
        if size <= pinned:
            return
        if pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))
        size = min(len(memory), -(-size // (1 << 21)) * (1 << 21))
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, size, 0))
        self._pinned[slot] = address, size

    def release(self, slot: int) -> None:
        self._released.append((slot, torch.cuda.current_stream(self._device).record_event()))

    def copied(self, wait: bool) -> Sequence[int]:
        """Released slots that the device has read; with `wait` at least one of them, if any was released."""
        free: list[int] = []
        while self._released and (self._released[0][1].query() or (wait and not free)):
            slot, event = self._released.popleft()
            event.synchronize()
            free.append(slot)
        return free

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
        for address, _ in self._pinned.values():
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))
        self._pinned.clear()


class _Splitter(pickle.Pickler):
    """Writes everything but the bytes of large arrays and tensors, and gathers those."""

    def __init__(self, frame: BytesIO) -> None:
        self.arrays: list[NDArray[np.uint8]] = []
        super().__init__(frame, 5, buffer_callback=self._keep)

    def _keep(self, buffer: pickle.PickleBuffer) -> bool:
        """Whether its bytes belong into the frame."""
        content = buffer.raw()
        if content.nbytes < _SMALL:
            return True
        self.arrays.append(np.frombuffer(content, np.uint8))
        return False

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        order = _descending(value)
        dense = value.permute(order).contiguous()
        flat = dense.reshape(-1)
        if flat.stride(0) != 1:  # of a single number, whose stride may be any
            flat = flat.clone(memory_format=torch.contiguous_format)
        content: Any = flat.view(torch.uint8).numpy()
        back = tuple(order.index(dim) for dim in range(value.ndim))
        return _tensor, (pickle.PickleBuffer(content), value.dtype, tuple(dense.shape), back)


def _split(batch: Any) -> tuple[bytes, list[NDArray[np.uint8]]]:
    frame = BytesIO()
    splitter = _Splitter(frame)
    splitter.dump(batch)
    return frame.getvalue(), splitter.arrays


def _tensor(buffer: Any, dtype: torch.dtype, shape: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    flat = torch.frombuffer(buffer, dtype=dtype) if memoryview(buffer).nbytes else torch.empty(0, dtype=dtype)
    return flat.reshape(shape).permute(order)


def _descending(value: Tensor) -> list[int]:
    """Its dimensions as they lie in memory, so that channels_last stays that."""
    strides = value.stride()
    return sorted(range(value.ndim), key=lambda dim: -strides[dim])


def _aligned(place: int) -> int:
    return -(-place // _ALIGNMENT) * _ALIGNMENT
