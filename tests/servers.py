"""Servers on the loopback that tests start: an S3 server, and a web server that fails in every way it is asked to."""

import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.cache.remote import objects

Fault = str | None
"""`cut`: half of the body, then the end. `stall`: half, then silence. `truncate`: half, as if that were all. `flip`:
one bit differs. `whole`: ranges are ignored. A number: that status. None: no fault."""


class FilesServer:
    """Serves the files below a folder, by ranges too.

    Attributes:
        fault: says how a request fails, by (path, how often it was asked before).
        requests: (path, first byte, bytes sent) of every request.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fault: Callable[[str, int], Fault] = lambda path, count: None
        self.requests: list[tuple[str, int, int]] = []
        self.lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            server_files = self

            def do_GET(self) -> None:
                self.server_files.answer(self)

            def do_HEAD(self) -> None:
                self.server_files.look(self)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.lstrip("/")
        with self.lock:
            fault = self.fault(path, sum(former == path for former, _, _ in self.requests))
            self.requests.append((path, 0, 0))
            place = len(self.requests) - 1
        file = self.root / path
        if fault is not None and fault.isdecimal():
            self._send(request, int(fault), b"")
            return
        if not file.is_file():
            self._send(request, 404, b"")
            return
        body, status, start = file.read_bytes(), 200, 0
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if asked and fault != "whole":
            start, stop = int(asked[1]), int(asked[2]) + 1
            if start >= len(body):
                self._send(request, 416, b"")
                return
            body, status = body[start:stop], 206
        if fault == "flip":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault == "truncate":
            body = body[: len(body) // 2]
        with self.lock:
            self.requests[place] = (path, start, len(body))
        self._send(request, status, body, fault)

    def look(self, request: BaseHTTPRequestHandler) -> None:
        """Answer how long a file is. It isn't counted; of the faults, it knows `404` alone."""
        path = request.path.lstrip("/")
        file = self.root / path
        there = file.is_file() and self.fault(path, 0) != "404"
        request.send_response(200 if there else 404)
        request.send_header("Content-Length", str(file.stat().st_size if there else 0))
        request.end_headers()

    def _send(self, request: BaseHTTPRequestHandler, status: int, body: bytes, fault: Fault = None) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if fault in ("cut", "stall"):
            request.wfile.write(body[: len(body) // 2])
            request.wfile.flush()
            time.sleep(2 if fault == "stall" else 0)
            request.close_connection = True
            request.connection.shutdown(2)
        else:
            request.wfile.write(body)

    @contextmanager
    def running(self) -> Iterator["FilesServer"]:
        thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            thread.join()
            self._http.server_close()


@contextmanager
def s3_server() -> Iterator[str]:
    """An S3 server with the bucket `bucket`; yields its URL. The environment leads boto's libraries to it.

    It is an interpreter of its own: it inherits no connection, lock or signal of this process, and stays small where
    the kernel looks for a large process to end.
    """
    import fsspec

    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            [sys.executable, "-c", S3],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
        assert server.stdout is not None
        url = server.stdout.readline().decode().strip()
        environment = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",  # a proxy of this machine can't reach its loopback
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            try:
                fsspec.filesystem("s3").clear_instance_cache()  # one that knows no such server, of an earlier test
                fsspec.filesystem("s3").mkdir("bucket")
                yield url
            finally:
                fsspec.filesystem("s3").clear_instance_cache()
                objects._kept.clear()
                ended = server.poll()
                server.kill()
                server.communicate()
                log.seek(0)
                assert ended is None, f"the S3 server ended with {ended}: {log.read().decode()}"


S3 = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
sys.stdin.read()  # until its owner ends
"""


def upload(folder: Path, url: str) -> None:
    """Put all files of a folder below an s3:// URL."""
    import fsspec

    system = fsspec.filesystem("s3")
    for file in folder.rglob("*"):
        if file.is_file():
            system.pipe_file(f"{url}/{file.relative_to(folder).as_posix()}", file.read_bytes())
