"""The stream of samples depends on neither the number of processes nor of workers, and a worker's memory stays flat."""

import errno
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from pipeline.assembly.knowledge import open_cached
from pipeline.assembly.samples import PretrainBatch
from pipeline.data.loader import Samples
from pipeline.data.masks import MaskSampler
from pipeline.data.order import EpochOrder
from pipeline.data.slots import Page
from pipeline.errors import ConfigError
from pipeline.steps import StepPlan
from tests import forked

GLOBAL, EPOCHS = 8, 3


def stream(
    cache: Path, images: Path, workers: int, rank: int = 0, processes: int = 1, start: int = 0, steps: int = 9
) -> Iterator[PretrainBatch]:
    """Two micro-batches a step."""
    knowledge = open_cached({"": cache}, None if cache.name == "webdataset" else str(images), None)
    dataset = knowledge.dataset(MaskSampler(16, 4, "sampled", seed=3), "visible")
    order = EpochOrder(knowledge.samples, 3, "full", 8, 2)
    plan = StepPlan(len(order) // GLOBAL, steps, GLOBAL, 2, processes, rank)
    return Samples(dataset, order, workers).batches(plan, start)


def global_batches(streams: list[Iterator[PretrainBatch]]) -> list[dict[str, bytes]]:
    """What each step shows, sample by sample in ascending order: the slices of all processes together."""
    shares = [list(one) for one in streams]
    steps = []
    for step in range(len(shares[0]) // 2):
        batches = [share[2 * step + micro] for share in shares for micro in range(2)]
        order = torch.cat([batch.indices for batch in batches]).argsort()
        tokens = [next(iter(batch.targets.values())) for batch in batches]
        columns = {
            "indices": [batch.indices for batch in batches],
            "pixels": [batch.images for batch in batches],  # the view and its flip
            "masks": [batch.ids_keep for batch in batches],
            "targets": [values for values, _ in tokens],
            "scales": [scale for _, scale in tokens],
        }
        steps.append({name: torch.cat(column)[order].numpy().tobytes() for name, column in columns.items()})  # type: ignore[arg-type]
    return steps


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_processes_and_workers_change_no_global_batch(
    cache: Path, image_tree: Path, processes: int, workers: int
) -> None:
    expected = global_batches([stream(cache, image_tree, 0)])
    found = global_batches([stream(cache, image_tree, workers, rank, processes) for rank in range(processes)])
    assert len(expected) == 9
    assert found == expected
    seen = np.concatenate([np.frombuffer(step["indices"], np.int64) for step in expected[:3]])
    assert sorted(seen.tolist()) == list(range(24))  # an epoch shows each sample once


@pytest.mark.parametrize("start", [1, 3, 5])
def test_a_stream_starts_anywhere(cache: Path, image_tree: Path, start: int) -> None:
    whole = global_batches([stream(cache, image_tree, 0)])
    assert global_batches([stream(cache, image_tree, 1, start=start)]) == whole[start:]


def test_a_worker_that_is_killed_is_said(cache: Path, image_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are forked, so they meet what is put here."""
    expected = len(list(stream(cache, image_tree, workers=1)))
    monkeypatch.setattr(Page, "pack", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ConfigError, match=r"^a process that loads data has ended \(SIGKILL\): .* lower data.workers"):
        list(stream(cache, image_tree, workers=2))
    assert len(list(stream(cache, image_tree, workers=0))) == expected  # nothing is handed over


def test_the_end_of_memory_is_said(cache: Path, image_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_name: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    batches = stream(cache, image_tree, workers=1)
    monkeypatch.setattr(Page, "pack", lambda *_: None)
    make, made = os.memfd_create, []
    monkeypatch.setattr(os, "memfd_create", lambda name: full(name) if made else made.append(name) or make(name))
    with pytest.raises(ConfigError, match=r"^no memory is left to hand a batch over: lower data.workers"):
        list(batches)


PRIVATE_BYTES = """
import json, sys
from pathlib import Path
from tests.test_stages.test_stream import private_bytes
cache, images, steps, every = sys.argv[1:]
print(json.dumps(private_bytes(Path(cache), Path(images), int(steps), int(every))))
"""


def private_bytes(cache: Path, images: Path, steps: int, every: int) -> list[int]:
    """Memory that the only worker shares with nobody, every so many micro-batches."""
    private: list[int] = []
    for number, _ in enumerate(stream(cache, images, workers=1, steps=steps)):
        if number % every == 0:
            (worker,) = psutil.Process().children()
            private.append(worker.memory_full_info().uss)
    return private


def test_the_memory_of_a_worker_is_flat_over_fifty_epochs(cache: Path, image_tree: Path) -> None:
    steps_per_epoch, epochs = 3, 50
    # In a process of its own: a worker is forked, and unshares its parent's pages bit by bit as it counts references
    # in them, so that it would grow with whatever the tests before this one have left in memory.
    arguments = cache, image_tree, steps_per_epoch * epochs, 2 * steps_per_epoch
    done = forked.run([sys.executable, "-c", PRIVATE_BYTES, *map(str, arguments)], text=True)
    assert done.returncode == 0, done.stderr
    private = json.loads(done.stdout)
    assert len(private) == epochs
    half = epochs // 2  # by then most pages that are ever unshared have been
    assert max(private[half:]) < max(private[:half]) + 2**20, private
