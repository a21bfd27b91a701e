"""A stage owns what is opened while it runs, and leaves nothing behind: no process, no thread, no process group."""

import functools
import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import ParamSpec, Protocol, TypeVar
from weakref import WeakSet

from accelerate.state import AcceleratorState
from torch import distributed

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class Closable(Protocol):
    """What a stage can own; closing it twice does nothing."""

    def close(self) -> None: ...


C = TypeVar("C", bound=Closable)

_stages: list[WeakSet[Closable]] = []  # what the stages at work own, the innermost last


def stage(run: Callable[P, R]) -> Callable[P, R]:
    """Make `run` the owner of what is opened in it: on any exit its loaders are closed, its process group left.

    An error alone would not do that: its traceback keeps alive what the frames hold, as long as somebody looks at it,
    and the other processes would wait for this one in the collective that they are in.
    """

    @functools.wraps(run)
    def owner(*args: P.args, **kwargs: P.kwargs) -> R:
        grouped = distributed.is_available() and distributed.is_initialized()
        owned: WeakSet[Closable] = WeakSet()
        _stages.append(owned)
        try:
            result = run(*args, **kwargs)
        except BaseException:
            try:
                _leave(owned, grouped, failed=True)
            except Exception:
                log.debug("leaving after an error", exc_info=True)
            raise
        _leave(owned, grouped, failed=False)
        return result

    return owner


def closed_with_stage(resource: C) -> C:
    """Let the stage at work close it, if it is still open then."""
    if _stages:
        _stages[-1].add(resource)
    return resource


def _leave(owned: WeakSet[Closable], grouped: bool, failed: bool) -> None:
    _stages.pop()
    with ExitStack() as last:
        if not grouped:
            last.callback(_leave_group, failed)
        for resource in list(owned):
            last.callback(resource.close)


def _leave_group(failed: bool) -> None:
    """Leave the process group that the stage has joined, so that its other processes learn of it at once."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if failed and "nccl" in distributed.get_backend():
        distributed.distributed_c10d._abort_process_group()  # to destroy it would wait for the others
    else:
        distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)  # or the next stage would think that the group is there
