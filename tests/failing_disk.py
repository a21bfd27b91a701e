"""A disk that fails at its k-th operation: no space, an I/O error, or the process killed or stopped there.

    environment = failing(folder, at=7, how="ENOSPC")
    forked.run([sys.executable, "-c", PROGRAM, *words], env=environment)

Counted are the operations that change what lies under `folder`: open for writing, write, fsync, mkdir, rename, link,
symlink. A write that fails has written half. torch.save and safetensors write outside Python: each file that they write
is one operation, which ends in the error that the library itself raises on a full disk.
"""

import atexit
import builtins
import errno
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

KINDS = ("ENOSPC", "EIO", "kill")
PROGRAM = "from tests.failing_disk import install; install(); import cli; cli.main()"
# The processes that the command starts are forked; the disk fails in the command itself alone.
PROGRAM_WITH_CHILDREN = (
    "from tests.failing_disk import Child, install; install();"
    "import cli, subprocess; subprocess.Popen = Child; cli.main()"
)
_SETTINGS = "MRMAE_FAILING_DISK"


def failing(folder: Path, at: int, how: str, log: Path | None = None) -> dict[str, str]:
    """The environment of a process whose `at`-th operation (from 1) under `folder` fails; 0: none does.

    Args:
        log: file that gets the operations as JSON [[operation, file name], ...] when the process ends by itself.
    """
    settings = {"folder": str(folder.resolve()), "at": at, "how": how, "log": str(log) if log else None}
    return {**os.environ, _SETTINGS: json.dumps(settings), "OMP_NUM_THREADS": "1"}


class FailingDisk:
    """Counts the operations under a folder, and lets one of them fail."""

    def __init__(self, folder: str, at: int, how: str, log: str | None) -> None:
        self.folder, self.at, self.how = folder, at, how
        self.operations: list[tuple[str, str]] = []
        self._lock = threading.Lock()  # caches are written by several threads
        self._process = os.getpid()  # data workers, which are forked, write nothing
        if log:
            atexit.register(lambda: real_open(log, "w").write(json.dumps(self.operations)))

    def holds(self, path: Any) -> bool:
        """Whether a path, or the file of a descriptor, lies under the folder."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        place = os.path.abspath(os.fsdecode(path))
        return os.getpid() == self._process and (place == self.folder or place.startswith(self.folder + os.sep))

    def count(self, operation: str, path: Any, half: Callable[[], Any] | None = None) -> None:
        """Count an operation, and fail if it is the one: after `half` of it was done."""
        with self._lock:
            self.operations.append((operation, os.path.basename(os.fsdecode(path)) if path else ""))
            failed = len(self.operations) == self.at
        if not failed:
            return
        if self.how == "stop":  # it goes on with the whole operation
            os.kill(os.getpid(), signal.SIGSTOP)
            return
        if half is not None:
            half()
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, self.how)
        raise OSError(number, os.strerror(number), os.fsdecode(path) if path else None)


real_open = io.open
disk: FailingDisk


class _File(io.FileIO):
    """A file open for writing on the failing disk."""

    def __init__(self, file: Any, mode: str = "r", closefd: bool = True, opener: Any = None) -> None:
        self._counted = mode.strip("b") != "r" and disk.holds(file)
        if self._counted:
            disk.count("open", file)
        super().__init__(file, mode, closefd, opener)

    def write(self, data: Any) -> int:
        if self._counted:
            content = bytes(data)
            disk.count("write", self.name, lambda: super(_File, self).write(content[: len(content) // 2]))
        return super().write(data)


def _open(
    file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, newline: Any = None,
    closefd: bool = True, opener: Any = None,
) -> Any:  # fmt: skip
    if isinstance(file, int) or not set(mode) & set("wax+") or not disk.holds(file):
        return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
    raw = _File(file, mode.replace("b", "").replace("t", ""), closefd, opener)
    if buffering == 0:
        return raw
    kind = io.BufferedRandom if "+" in mode else io.BufferedWriter
    buffered = kind(raw, buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE)
    if "b" in mode:
        return buffered
    text = io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)
    text.mode = mode  # type: ignore[misc]  # as io.open does
    return text


def _counted(name: str, function: Callable[..., Any], place: int) -> Callable[..., Any]:
    """`function` of os, counted by the path that is its argument number `place`."""

    def call(*args: Any, **keys: Any) -> Any:
        if disk.holds(args[place]):
            disk.count(name, os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else args[place])
        return function(*args, **keys)

    return call


def _library(function: Callable[..., Any], place: int, error: Callable[[OSError], Exception]) -> Callable[..., Any]:
    """A library's function that writes the file which is its argument number `place`."""

    def call(*args: Any, **keys: Any) -> Any:
        try:
            if disk.holds(args[place]):
                disk.count("write", args[place], lambda: real_open(args[place], "wb").write(b"torn"))
        except OSError as failure:
            raise error(failure) from None
        return function(*args, **keys)

    return call


def install() -> None:
    """Put the failing disk of this process's environment in the place of the real one."""
    global disk
    import torch
    from safetensors import SafetensorError

    from pipeline import files, tensor_files

    disk = FailingDisk(**json.loads(os.environ[_SETTINGS]))
    builtins.open = io.open = _open  # type: ignore[assignment]
    files.FileIO = _File  # type: ignore[misc]
    for name, place in (("replace", 1), ("rename", 1), ("link", 1), ("symlink", 1), ("mkdir", 0), ("fsync", 0)):
        setattr(os, name, _counted(name, getattr(os, name), place))
    # The texts are those of torch 2 and safetensors 0.4 on a full disk.
    torch.save = _library(
        torch.save, 1, lambda failure: RuntimeError(f"PytorchStreamWriter failed writing file: {failure.strerror}")
    )
    tensor_files.save_file = _library(
        tensor_files.save_file, 1,
        lambda failure: SafetensorError(
            f"Error while serializing: I/O error: {failure.strerror} (os error {failure.errno})"
        ),
    )  # fmt: skip


class Child:
    """In the place of subprocess.Popen: a command line of this program, run by a fork of this process."""

    def __init__(self, command: list[str], stdout: Any, stderr: int, env: Mapping[str, str]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        os.environ.update(env)
        import cli

        for number in (1, 2):
            os.dup2(stdout.fileno(), number)
        sys.argv, status = command[1:], 1
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            os._exit(status)

    def poll(self) -> int | None:
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode
