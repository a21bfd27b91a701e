"""Python processes without the CPU seconds that an interpreter needs to import torch and every stage.

One server imports them once and forks for each process that a test starts. There, `python -m cli WORDS`,
`python .../cli.py WORDS` or `python -c CODE WORDS` runs as an interpreter runs it: in the caller's folder, environment
and process group, with signals as at a start, and at its end threads are joined, exit handlers run and garbage is
collected. What differs: the seed of hashes, what is imported already and what libraries read from the environment
while they were loaded are the server's, and the modules are not taken down, which takes longer than most commands here.
"""

import atexit
import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).parents[1]
CLI = [sys.executable, "-m", "cli"]
CLI_FILE = [sys.executable, str(ROOT / "cli.py")]
_start = subprocess.Popen  # also where a test puts ours in its place
LARGEST = 2**17  # bytes of a request: words and environment


class Popen:
    """What tests use of subprocess.Popen, for a forked process. What PIPE asks for is kept and read at the end."""

    def __init__(
        self,
        args: list[str],
        *,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        text: bool = False,
        start_new_session: bool = False,
    ) -> None:
        args = [*CLI, *args[2:]] if args[:2] == CLI_FILE else args
        self.args, self._text = args, text
        self.returncode: int | None = None
        self._kept = [tempfile.TemporaryFile() if output == subprocess.PIPE else None for output in (stdout, stderr)]
        with open(os.devnull, "wb") as nowhere:
            written = _descriptor(stdout, 1, self._kept[0], nowhere)
            errors = written if stderr == subprocess.STDOUT else _descriptor(stderr, 2, self._kept[1], nowhere)
            request = {
                "code": _code(args),
                "words": args[3:],
                "cwd": os.fspath(cwd or Path.cwd()),
                "env": dict(os.environ if env is None else env),
                "start_new_session": start_new_session,
            }
            self._news = open(_ask(request, written, errors), "rb", buffering=0)
        self.pid = int(self._news.read(16))

    def poll(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        self.wait(timeout)
        return self._output(0), self._output(1)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            news = select.poll()  # select.select knows no descriptor above 1,023
            news.register(self._news, select.POLLIN)
            if news.poll(None if timeout is None else 1000 * timeout):
                self.returncode = int(self._news.read(16))
                self._news.close()
        return self.returncode

    def _output(self, number: int) -> str | bytes | None:
        file = self._kept[number]
        if file is None:
            return None
        with file:
            file.seek(0)
            output = file.read()
        self._kept[number] = None
        return output.decode() if self._text else output


def run(args: list[str], timeout: float = 300, **keys: Any) -> "subprocess.CompletedProcess[Any]":
    """subprocess.run, with its output kept."""
    process = Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **keys)
    try:
        process.wait(timeout)
    finally:
        process.kill()
        output, errors = process.communicate()
    return subprocess.CompletedProcess(args, process.wait(), output, errors)


def _code(args: list[str]) -> str:
    if args[:3] == CLI:
        return "import cli; cli.main()"
    assert args[:2] == [sys.executable, "-c"], f"only `python -m cli` and `python -c` are forked: {args}"
    return args[2]


def _descriptor(wanted: int | IO[Any] | None, inherited: int, kept: IO[bytes] | None, nowhere: IO[bytes]) -> int:
    if wanted is None:
        return inherited
    if kept is not None or wanted == subprocess.DEVNULL:
        return (kept or nowhere).fileno()
    return wanted if isinstance(wanted, int) else wanted.fileno()


_server: tuple[socket.socket, "subprocess.Popen[bytes]"] | None = None
_starting = threading.Lock()  # ranks are started side by side


def _ask(request: dict[str, Any], written: int, errors: int) -> int:
    """Hand a request to the server, which is started for the first; a pipe that brings the pid, then the exit code."""
    global _server
    with _starting:
        if _server is None:
            near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            command = [sys.executable, "-m", "tests.forked", str(far.fileno())]
            # A pool of threads, as numpy's library makes when it is loaded, can't be forked.
            environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
            environment.pop("OMP_NUM_THREADS", None)  # each request brings its own, or none
            with far:
                _server = near, _start(command, cwd=ROOT, env=environment, pass_fds=[far.fileno()])
    news, tell = os.pipe()
    socket.send_fds(_server[0], [json.dumps(request).encode()], [written, errors, tell])
    os.close(tell)
    return news


def close() -> None:
    """End the server, if there is one; no process that it forked."""
    global _server
    if _server is not None:
        channel, process = _server
        channel.close()
        process.wait()
        _server = None


def serve(channel: socket.socket) -> str | None:
    """Fork for each request until nobody can ask any more. Returns in the forked process, with the code to run."""
    for folder in (ROOT / "stages", ROOT / "pipeline"):
        for file in sorted(folder.rglob("*.py")):
            import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
    import_module("cli")
    gc.collect()
    gc.freeze()  # a collection in a forked process neither walks nor copies what is imported
    gc.unfreeze = lambda: None  # nor does one after a training, which thaws what it froze
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for those that were forked
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, LARGEST, 3)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not message:
            return None
        if os.fork() == 0:
            channel.close()
            forked = os.fork()
            if forked:
                _tell_the_end(forked, descriptors[-1])
            signal.signal(signal.SIGINT, interrupt)
            return _forked(json.loads(message), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _tell_the_end(forked: int, tell: int) -> NoReturn:
    _, status = os.waitpid(forked, 0)
    with contextlib.suppress(BrokenPipeError):  # nobody wants to know any more
        os.write(tell, b"%-16d" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _forked(request: dict[str, Any], written: int, errors: int, tell: int) -> str:
    """Become the process that was asked for, and tell its pid; returns the code to run."""
    if request["start_new_session"]:
        os.setsid()
    os.write(tell, b"%-16d" % os.getpid())
    with open(os.devnull, "rb") as nothing:
        for descriptor, number in ((nothing.fileno(), 0), (written, 1), (errors, 2)):
            os.dup2(descriptor, number)
    for descriptor in (written, errors, tell):
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = ["mrmae", *request["words"]]
    _as_started()
    return str(request["code"])


def _as_started() -> None:
    """What an interpreter draws or reads at its start."""
    import numpy as np
    import torch

    np.random.seed()
    torch.default_generator.seed()
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _run(code: str) -> NoReturn:
    """Run it as the program of this process, and end as an interpreter ends."""
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(end.code + "\n")
    except BaseException as error:  # noqa: BLE001 - the end of a program
        status = 1
        sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
        sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    gc.collect()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    code = serve(socket.socket(fileno=int(sys.argv[1])))
    if code is None:
        os._exit(0)
    _run(code)


def exit_code(pid: int, seconds: float) -> int | None:
    """That of a child of this process, negative after a signal; None: it hung, and was killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None
