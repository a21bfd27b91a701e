"""A server of a finished cache, and no pauses before requests are tried again."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cache.remote import objects
from tests.servers import FilesServer


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_PAUSES", (0.001,) * 6)


@pytest.fixture
def server(cache: Path) -> Iterator[FilesServer]:
    with FilesServer(cache).running() as running:
        yield running
