"""The files below a URL, through fsspec: read in blocks and written, with retries.

fsspec has one interface for S3 (s3fs), Google Cloud (gcsfs), the Hugging Face hub and web servers, and starts anew in a
forked process. obstore read 780 to 1,170 MB/s on the loopback, fsspec 450 to 960, for two thirds of the CPU time. But a
process that is forked after its first read hangs, and it does not know the hub.
"""

import contextlib
import errno
import importlib.util
import logging
import os
import random
import re
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import CacheDamage, ConfigError, StorageError

log = logging.getLogger(__name__)

BLOCK = 16 << 20  # bytes that one request reads
STREAMS = 8  # requests at once for one file
SMALL_FILES = 32  # small files that are waited for at once
_PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each further try
_SILENCE = 30  # seconds without a byte that end a request
_CONNECT = 10  # seconds that a connection may take
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub"}
_REASON_LENGTH = 200

_jitter = random.SystemRandom()  # which leaves the seeded generators alone

_kept: dict[tuple[int, str], Any] = {}  # file systems, by process and scheme

T = TypeVar("T")


class Objects:
    """The files below a URL; names have slashes. Pickles small, and works in threads and forked processes."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._scheme = url.partition("://")[0]
        package = _PACKAGES[self._scheme]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"{url}: {self._scheme}:// needs {package}: pip install -e '.[remote]'")

    def __str__(self) -> str:
        return self.url

    def read_whole(self, name: str) -> bytes:
        """A small file. Raises FileNotFoundError, or StorageError as `read`."""
        content: bytes = self._retry(name, lambda: self._system.cat_file(f"{self.url}/{name}"))
        return content

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` - 1 of a file.

        Raises:
            FileNotFoundError: there is no such file.
            CacheDamage: it is shorter than `stop`.
            StorageError: refused, or it failed again and again.
        """
        options = {"cache_type": "none"} if self._scheme == "hf" else {}
        content: bytes = self._retry(
            name, lambda: self._system.cat_file(f"{self.url}/{name}", start=start, end=stop, **options)
        )
        if len(content) < stop - start:
            raise CacheDamage(f"it ends at byte {start + len(content)}")
        if len(content) > stop - start:
            raise StorageError(
                f"{self.url}: the server answers a range with more than it: choose one that knows ranges"
            )
        return content

    def blocks(self, name: str, size: int) -> Generator[bytes, None, None]:
        """A file of `size` bytes in order, block by block, `STREAMS` requests ahead; errors as `read`."""
        spans = ((start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))
        with ThreadPoolExecutor(STREAMS, "fetch") as pool:
            under_way: deque[Future[bytes]] = deque()
            try:
                under_way.extend(pool.submit(self.read, name, *span) for span in islice(spans, STREAMS))
                while under_way:
                    content = under_way.popleft().result()
                    under_way.extend(pool.submit(self.read, name, *span) for span in islice(spans, 1))
                    yield content
            finally:
                pool.shutdown(cancel_futures=True)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        with contextlib.suppress(FileNotFoundError):
            self._forget(name)
            return int(self._retry(name, lambda: self._system.size(f"{self.url}/{name}")))
        return None

    def names(self, folder: str) -> list[str]:
        """The names of the files in a folder below the URL; only where `takes_files`."""
        with contextlib.suppress(FileNotFoundError):
            self._forget(f"{folder}/")
            paths = self._retry(folder, lambda: self._system.ls(f"{self.url}/{folder}", detail=False))
            return [path.rpartition("/")[2] for path in paths]
        return []

    def upload(self, name: str, path: Path) -> None:
        """Write a file from a local one. Whoever reads sees the former file or all of this one."""
        self._retry(name, lambda: self._system.put_file(str(path), f"{self.url}/{name}"))

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, as `upload` does."""
        self._retry(name, lambda: self._system.pipe_file(f"{self.url}/{name}", content))

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._retry(name, lambda: self._system.rm_file(f"{self.url}/{name}"))

    @property
    def _system(self) -> Any:
        """This process's file system: fsspec keeps it, and makes another one after a fork.

        That of a process that this one was forked from is kept too. Its end would take its connections out of the
        event loop, which both processes share: requests under way there would never be answered.
        """
        import fsspec

        system = fsspec.filesystem(self._scheme, **_options(self._scheme))
        _kept.setdefault((os.getpid(), self._scheme), system)
        return system

    @property
    def takes_files(self) -> bool:
        """Whether files can be written there. The hub takes them too, but each would be a commit of its own."""
        return self._scheme in ("s3", "gs")

    def _forget(self, name: str) -> None:
        """Let the library look again at what it may remember."""
        self._system.invalidate_cache(self._system._strip_protocol(f"{self.url}/{name}".rpartition("/")[0]))

    def _retry(self, name: str, call: Callable[[], T]) -> T:
        where = f"{self.url}/{name}"
        for pause in (*_PAUSES, None):
            try:
                return call()
            except FileNotFoundError:
                raise
            except Exception as error:
                status = _status(error)
                if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__:
                    raise StorageError(
                        f"{where}: permission denied: give the library credentials that may reach it (AWS_PROFILE, "
                        "hf auth login, gcloud auth, ~/.netrc, ...)"
                    ) from error
                if status == 404:
                    raise FileNotFoundError(where) from error
                if status == 416 or getattr(error, "errno", None) == errno.EINVAL:  # the latter is s3fs's
                    raise CacheDamage("it ends before its last block") from error
                if pause is None:
                    raise StorageError(
                        f"{where}: {len(_PAUSES) + 1} tries failed, the last by {_reason(error)}: check the network "
                        "and the server, then run the same command again"
                    ) from error
                log.debug("%s: %s; the next try in %.1f s", where, _reason(error), pause)
            time.sleep(pause * _jitter.uniform(0.5, 1.5))  # or processes that failed together try again together
        raise AssertionError


def _options(scheme: str) -> dict[str, Any]:
    """Timeouts: a server that says nothing is one that fails. Everything else is the library's own configuration."""
    if scheme == "s3":
        # With a concurrency of its own it would ask for a file's size before it reads it.
        timeouts = {"connect_timeout": _CONNECT, "read_timeout": _SILENCE}
        return {"config_kwargs": timeouts, "max_concurrency": 1, "session": _s3_session(os.getpid())}
    if scheme in ("http", "https", "gs"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=_CONNECT, sock_read=_SILENCE)
        session = {"timeout": timeout, "trust_env": True}
        if scheme != "gs":
            return {"client_kwargs": session}
        # gcsfs reads it when it is imported. Else it asks by gRPC, which is not safe after a fork, for a bucket's kind,
        # and asks again with each request where it gets no answer.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        return {"session_kwargs": session}
    return {}


@cache
def _s3_session(_process: int) -> Any:
    """A session of botocore for each process, which all read the library's files on S3 through one loader.

    Parsing them takes 60 ms of a client's start; a process that is forked has what its parent has parsed.
    """
    from aiobotocore.session import AioSession

    session = AioSession()
    session.register_component("data_loader", _s3_loader())
    return session


@cache
def _s3_loader() -> Any:
    from botocore.loaders import create_loader

    return create_loader()


def _status(error: Exception) -> int | None:
    """The HTTP status that a library's error carries: aiohttp's, httpx's, gcsfs's."""
    for holder, name in ((error, "status"), (getattr(error, "response", None), "status_code"), (error, "code")):
        status = getattr(holder, name, None)
        if isinstance(status, int | str) and str(status).isdecimal():
            return int(status)
    return None


def _reason(error: Exception) -> str:
    """An error in short, without the query of a URL: it may be a signature."""
    text = re.sub(r"\?[^\s'\"]*", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:_REASON_LENGTH].rstrip(": ")
