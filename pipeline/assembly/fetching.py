"""Shards of remote caches, fetched in the order in which a run will show them."""

from collections.abc import Iterator, Sequence

from pipeline.cache import FetchAhead, Mirror
from pipeline.data.loader import Request
from pipeline.data.order import EpochOrder
from pipeline.ownership import closed_with_stage


class OrderedFetching:
    """Passes a run's requests on, and has the shards of their window and of the next one fetched.

    Args:
        order: with the caches' shards as its blocks.
    """

    def __init__(self, mirrors: Sequence[Mirror], order: EpochOrder) -> None:
        self._order = order
        self._fetcher = closed_with_stage(FetchAhead(mirrors))
        self._shown: tuple[int, set[int]] = (-1, set())  # the epoch and the window that were announced

    def __call__(self, requests: Iterator[list[Request]]) -> Iterator[list[Request]]:
        for request in requests:
            self._announce(*request[0])
            yield request

    def _announce(self, epoch: int, index: int) -> None:
        if self._shown[0] == epoch and index // self._order.block_size in self._shown[1]:
            return
        windows = self._order.windows(epoch, index, 2)
        self._shown = epoch, set(windows[0])
        self._fetcher.want([shard for window in windows for shard in window])
