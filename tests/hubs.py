"""Stands for the Hugging Face hub and Google Cloud Storage on the loopback: what their libraries ask to read files."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from pipeline.cache.remote import objects
from tests.servers import FilesServer


class _JsonServer(FilesServer):
    """Files by ranges, as its base, beside answers in JSON."""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        url = urlsplit(request.path)
        file = self.file_of(unquote(url.path))
        if file is not None:
            request.path = file
            super().answer(request)
            return
        found = self.facts(unquote(url.path), {key: values[0] for key, values in parse_qs(url.query).items()})
        self._send(request, 404 if found is None else 200, json.dumps(found or {}).encode())

    def file_of(self, path: str) -> str | None:
        """The file whose content is asked for; None: something else is."""
        raise NotImplementedError

    def facts(self, path: str, query: dict[str, str]) -> Any:
        """What is said of the files; None: nothing is there."""
        raise NotImplementedError

    def children(self, folder: str) -> list[Path]:
        path = self.root / folder
        return sorted(path.iterdir()) if path.is_dir() else []


class HubServer(_JsonServer):
    """The data set `owner/name` with the files below a folder."""

    def file_of(self, path: str) -> str | None:
        prefix = "/datasets/owner/name/resolve/main/"
        return path.removeprefix(prefix) if path.startswith(prefix) else None

    def facts(self, path: str, query: dict[str, str]) -> Any:
        repository, _, asked = path.partition("/owner/name")
        if repository == "/api/datasets" and asked in ("", "/revision/main"):
            return {"id": "owner/name", "sha": "0" * 40}
        if not asked.startswith("/tree/main"):
            return None
        return [self._entry(path) for path in self.children(asked.removeprefix("/tree/main/"))] or None

    def _entry(self, path: Path) -> dict[str, Any]:
        kind, size = ("directory", 0) if path.is_dir() else ("file", path.stat().st_size)
        return {"type": kind, "path": path.relative_to(self.root).as_posix(), "size": size, "oid": "0" * 40}


@contextmanager
def hub(root: Path) -> Iterator[HubServer]:
    """A hub with the files below `root` at `hf://datasets/owner/name`."""
    from huggingface_hub import constants

    with HubServer(root).running() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setattr(constants, "ENDPOINT", server.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        try:
            yield server
        finally:
            objects._kept.clear()


class BucketServer(_JsonServer):
    """The bucket `bucket` of Google Cloud Storage with the files below a folder, by its JSON API; it takes files."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        handler: Any = self._http.RequestHandlerClass
        handler.do_POST, handler.do_DELETE = lambda request: self.store(request), lambda request: self.remove(request)

    def file_of(self, path: str) -> str | None:
        prefix = "/download/storage/v1/b/bucket/o/"
        return path.removeprefix(prefix) if path.startswith(prefix) else None

    def facts(self, path: str, query: dict[str, str]) -> Any:
        listing, _, name = path.partition("/o/")
        if name:
            return self._object(self.root / name) if (self.root / name).is_file() else None
        if listing != "/storage/v1/b/bucket/o":
            return None
        paths = self.children(query.get("prefix", ""))
        folders = [f"{path.relative_to(self.root).as_posix()}/" for path in paths if path.is_dir()]
        return {"items": [self._object(path) for path in paths if path.is_file()], "prefixes": folders}

    def store(self, request: BaseHTTPRequestHandler) -> None:
        """A file in one request: its name in JSON, a line, then its content, between boundaries."""
        body = request.rfile.read(int(request.headers["Content-Length"]))
        boundary = b"\n--==0=="
        facts, _, second = body.partition(b"\n\n")[2].partition(boundary)
        path = self.root / json.loads(facts)["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(second.partition(b"\n\n")[2].removesuffix(boundary + b"--"))
        self._send(request, 200, json.dumps(self._object(path)).encode())

    def remove(self, request: BaseHTTPRequestHandler) -> None:
        path = self.root / unquote(request.path).partition("/o/")[2]
        status = 204 if path.is_file() else 404
        path.unlink(missing_ok=True)
        self._send(request, status, b"")

    def _object(self, path: Path) -> dict[str, str]:
        return {"name": path.relative_to(self.root).as_posix(), "bucket": "bucket", "size": str(path.stat().st_size)}


@contextmanager
def google_storage(root: Path) -> Iterator[BucketServer]:
    """A server of `gs://bucket` with the files below `root`."""
    import fsspec

    with BucketServer(root).running() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("STORAGE_EMULATOR_HOST", server.url)
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        try:
            yield server
        finally:
            fsspec.get_filesystem_class("gs").clear_instance_cache()
            objects._kept.clear()
