"""Python's garbage collection at fixed steps, rather than in the middle of some step of some process.

A collection that starts by itself stops one process for a tenth of a second while the others wait for its gradients.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_EVERY = 50  # steps


class FixedCollection:
    """Context manager: inside, garbage is collected when `step` and `all` say so; leaving restores what was before."""

    def __enter__(self) -> "FixedCollection":
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.freeze()  # libraries and the model stay: no collection need look at their millions of objects again
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()

    def step(self, done: int) -> None:
        """After step number `done`, the same in every process: collect what is young, now and then."""
        if done % _EVERY == 0:
            gc.collect(1)

    def all(self) -> None:
        """Collect everything, at a moment that is no step's."""
        gc.collect()

    @contextmanager
    def as_ever(self) -> Iterator[None]:
        """Inside, collection starts by itself again: an evaluation makes other garbage than steps do."""
        if self._was_enabled:
            gc.enable()
        try:
            yield
        finally:
            gc.disable()
