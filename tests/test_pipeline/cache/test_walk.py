"""Two threads walk a file: every byte arrives in its block, and in the measure; nothing hangs when either gives up."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cache.check.walk import Walker
from pipeline.cache.files import Descriptor, hash_file
from pipeline.errors import CacheDamage


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(100_000))
    return path


def walked(walker: Walker, file: Path, sizes: list[int]) -> list[bytes]:
    blocks = []
    for block in walker.blocks(Descriptor(file), sizes):
        assert not isinstance(block, CacheDamage), block
        blocks.append(bytes(block))
    return blocks


@pytest.mark.parametrize("sizes", [[], [100_000], [1], [40_000, 1, 50_000], [7_000] * 14], ids=str)
def test_blocks_and_measure(file: Path, sizes: list[int]) -> None:
    walker = Walker()
    for _ in range(2):  # its memory serves again
        blocks = walked(walker, file, sizes)
        assert [len(block) for block in blocks] == sizes
        assert file.read_bytes().startswith(b"".join(blocks))
        assert walker.measure == hash_file(file)


def test_a_block_stays_until_the_next_is_asked_for(file: Path) -> None:
    content, at = file.read_bytes(), 0
    for block in Walker().blocks(Descriptor(file), [10_000] * 10):
        threading.Event().wait(0.005)  # time enough to read all the others
        assert not isinstance(block, CacheDamage)
        assert bytes(block) == content[at : at + 10_000]
        at += 10_000


def test_what_can_not_be_read_has_no_measure(file: Path) -> None:
    walker = Walker()
    blocks = list(walker.blocks(Descriptor(file), [60_000, 60_000]))
    assert not isinstance(blocks[0], CacheDamage)
    assert "ends at byte 100000" in str(blocks[1])
    assert walker.measure is None
    assert list(walker.blocks(Descriptor(file), [])) == []
    assert walker.measure == hash_file(file)


def test_a_caller_who_stops_early_leaves_a_walker_that_works(file: Path) -> None:
    walker = Walker()
    for _ in walker.blocks(Descriptor(file), [1_000] * 100):
        break
    assert b"".join(walked(walker, file, [1_000] * 100)) == file.read_bytes()
    assert walker.measure == hash_file(file)


def test_an_interrupt_between_the_threads_leaves_none_waiting(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, reading = ThreadPoolExecutor.submit, list[Future[None]]()

    def interrupted(*args: Any) -> None:
        reading.append(submit(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(Walker().blocks(Descriptor(file), [1_000] * 100))
    reading[0].result(10)


def test_an_error_of_the_second_thread_is_raised_in_the_first(file: Path) -> None:
    with pytest.raises((MemoryError, ValueError)):  # no computer holds that block
        list(Walker().blocks(Descriptor(file), [10_000, 2**62]))


def test_the_second_thread_ends_with_the_walker(file: Path) -> None:
    before = set(threading.enumerate())
    walker = Walker()
    list(walker.blocks(Descriptor(file), [10_000]))
    [thread] = set(threading.enumerate()) - before
    del walker
    thread.join(10)
    assert not thread.is_alive()
