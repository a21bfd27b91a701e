"""A process that fetches shards before they are wanted, so that those that train or load data needn't wait for them."""

import logging
import os
import signal
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import product
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import NoReturn

from pipeline.cache.remote.mirror import Mirror
from pipeline.errors import PipelineError, StorageError
from pipeline.forking import fork, settle

log = logging.getLogger(__name__)

_AT_ONCE = 4  # shards that are fetched side by side, as cache-copy does
_PAUSE = 0.5  # seconds before it looks again for room, or for what another process fetches


class FetchAhead:
    """Fetches the shards of some caches in the order that is wanted. A process of its own: it leaves with its owner.

    It reports no error: whoever reads the shard meets the same one and says so.
    """

    def __init__(self, mirrors: Sequence[Mirror]) -> None:
        self._owner = os.getpid()
        self._socket, far_end = Pipe()
        self._pid = fork()
        if not self._pid:
            self._socket.close()
            _serve(far_end, mirrors)
        far_end.close()

    def want(self, shards: Sequence[int]) -> None:
        """Fetch these, four at once in this order, and nothing else from now on. It doesn't wait."""
        try:
            self._socket.send(list(shards))
        except OSError:
            log.debug("the process that fetches ahead has ended; readers fetch for themselves")

    def close(self) -> None:
        """End the process. What it was fetching is fetched again by whoever wants it."""
        if os.getpid() != self._owner or not self._pid:
            return
        self._socket.close()
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._pid = 0


def _serve(socket: Connection, mirrors: Sequence[Mirror]) -> NoReturn:
    """What the process does until its socket is closed."""
    try:
        settle()
        _fetch(socket, mirrors)
    except (EOFError, ConnectionResetError):
        os._exit(0)
    except Exception:
        log.warning("shards are no longer fetched ahead", exc_info=True)
    finally:
        os._exit(1)


def _fetch(socket: Connection, mirrors: Sequence[Mirror]) -> NoReturn:
    wanted: list[int] = socket.recv()
    failed = set[tuple[Mirror, int]]()
    pool = ThreadPoolExecutor(_AT_ONCE, "ahead")
    while True:
        for mirror in mirrors:
            mirror.touch(wanted)
        finished, under_way = set[Future[bool]](), set[Future[bool]]()
        for shard, mirror in product(wanted, mirrors):
            if len(under_way) == _AT_ONCE:
                done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                finished |= done
            if socket.poll():
                break
            under_way.add(pool.submit(_is_done, mirror, shard, wanted, failed))
        complete = all(task.result() for task in finished | under_way)
        if socket.poll(None if complete else _PAUSE):
            wanted = socket.recv()


def _is_done(mirror: Mirror, shard: int, wanted: Sequence[int], failed: set[tuple[Mirror, int]]) -> bool:
    """Whether the shard is local by now, or can't be."""
    if (mirror, shard) in failed:
        return True
    try:
        return mirror.fetch_ahead(shard, wanted)
    except StorageError as error:  # the server may be back soon
        log.debug("shard %d isn't fetched ahead yet: %s", shard, error)
        return False
    except PipelineError as error:
        log.debug("shard %d isn't fetched ahead: %s", shard, error)
        failed.add((mirror, shard))
        return True
