"""Parts of a long benchmark, one after the other, within a time limit; a signal ends them in good order."""

import gc
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch

log = logging.getLogger(__name__)

_RESERVE = 5.0  # seconds at the end, to leave in good order


class Part(NamedTuple):
    """A measurement that may be skipped, fail or be cut off without the others."""

    name: str
    seconds: float  # that it takes on an H100, with room
    run: Callable[[], dict[str, Any]]


class _Interrupted(BaseException):
    """A part's time is over, or a signal came. No Exception, or a library might take it for a fault of its own."""


def run_parts(parts: Sequence[Part], minutes: float, patience: float) -> dict[str, Any]:
    """Run the parts that fit into the time; logs a line for each as soon as it is done.

    Args:
        minutes: for all parts.
        patience: a part may take so many times its `seconds`.

    Returns:
        "parts": name → figures; "skipped": names; "failed": name → reason; "stopped": the signal that came, if any;
        "seconds".
    """
    began = time.monotonic()
    figures: dict[str, Any] = {"parts": {}, "skipped": [], "failed": {}}
    with _interruptible(figures):
        for part in parts:
            left = began + 60 * minutes - _RESERVE - time.monotonic()
            if left < part.seconds:
                figures["skipped"].append(part.name)
                log.info("%s: skipped, %.0f s are left", part.name, max(left, 0))
            else:
                _run_part(part, min(left, patience * part.seconds), figures)
    figures["seconds"] = round(time.monotonic() - began, 1)
    return figures


@contextmanager
def _interruptible(figures: dict[str, Any]) -> Iterator[None]:
    """SIGTERM, ctrl-C and the alarm raise _Interrupted inside; a signal also ends the block and is noted in figures."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if "stopped" in figures:
            return  # another signal would cut off the leaving
        if number != signal.SIGALRM:
            figures["stopped"] = signal.Signals(number).name
        raise _Interrupted

    numbers = (signal.SIGALRM, signal.SIGINT, signal.SIGTERM)
    former = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    except _Interrupted:
        log.info("stopped by %s", figures["stopped"])
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _run_part(part: Part, limit: float, figures: dict[str, Any]) -> None:
    """Run a part for at most `limit` seconds; its figures, or why there are none, go into `figures`."""
    began = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            found = part.run()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _Interrupted:
        if "stopped" in figures:
            raise
        figures["failed"][part.name] = f"stopped after {limit:.0f} s"
    except Exception as error:  # noqa: BLE001 - out of memory, or what a library refuses: the other parts go on
        figures["failed"][part.name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    else:
        figures["parts"][part.name] = found | {"seconds": round(time.monotonic() - began, 1)}
    result = figures["failed"].get(part.name) or json.dumps(figures["parts"][part.name])
    log.info("%s: %s (%.0f s)", part.name, result, time.monotonic() - began)
    gc.collect()  # networks and loaders of the part
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
