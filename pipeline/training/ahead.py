"""Each batch is on its way to the device while the one before it is being trained on."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import torch


class Movable(Protocol):
    """A micro-batch: it knows how to copy itself to a device."""

    def to(self, device: torch.device) -> Any: ...


B = TypeVar("B", bound=Movable)


def ahead(batches: Iterable[B], device: torch.device) -> Iterator[B]:
    """The same batches on the device, each copied a turn early: on CUDA, by a stream of its own."""
    waiting: tuple[B, Callable[[], None], B] | None = None
    start = _copier(device)
    for batch in batches:
        # The batch on the host is kept until the training stream waits for its copy: what is reused for another batch
        # when this one is dropped asks that stream alone whether it still is being read.
        moved = *start(batch), batch
        if waiting is not None:
            waiting[1]()
            yield waiting[0]
        waiting = moved
    if waiting is not None:
        waiting[1]()
        yield waiting[0]


def _copier(device: torch.device) -> Callable[[B], tuple[B, Callable[[], None]]]:
    """batch → (its copy on the device, what lets the training stream wait for it)."""
    if device.type != "cuda":
        return lambda batch: (batch.to(device), lambda: None)
    stream, training = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def start(batch: B) -> tuple[B, Callable[[], None]]:
        # The room of the last batch but one is free for this copy when the steps launched so far are done.
        stream.wait_stream(training)
        with torch.cuda.stream(stream):
            moved = batch.to(device)
            arrived = stream.record_event()
        return moved, lambda: training.wait_event(arrived)

    return start
