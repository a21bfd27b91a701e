"""One progress bar for all long work: rate, time left, a note. Silent when standard error is no terminal."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


class Progress:
    """A bar over `total` units; use as a context manager."""

    def __init__(self, total: int, label: str, unit: str, done: int = 0, show: bool = True) -> None:
        self._bar = tqdm(
            total=total, initial=done, desc=label, unit=unit, disable=not (show and sys.stderr.isatty()), leave=False
        )

    @property
    def shown(self) -> bool:
        """Whether somebody sees the bar."""
        return not self._bar.disable

    def expect(self, total: int) -> None:
        """Set the total, where it is known only after the start."""
        self._bar.total = total

    def advance(self, count: int = 1, **notes: str) -> None:
        if notes:
            self._bar.set_postfix(notes, refresh=False)
        self._bar.update(count)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def track(items: Iterable[T], total: int, label: str, unit: str) -> Iterator[T]:
    """Pass items through, one tick each."""
    with Progress(total, label, unit) as progress:
        for item in items:
            yield item
            progress.advance()
