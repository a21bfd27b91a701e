"""One writer at a time, and what becomes of the others and of the dead."""

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.evaluation.records import read_records
from pipeline.files import remove_dead_partials, whole_file, whole_folder, write_text
from pipeline.locks import FileLock, LockedError, lock_folder

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from pipeline.locks import FileLock
with FileLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def holder(path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    with holder(tmp_path / "run.lock") as first:
        line = (
            rf"^output={tmp_path} is being written by process {first.pid} on {socket.gethostname()} since 20..-.*wait"
        )
        with pytest.raises(ConfigError, match=line):
            lock_folder(tmp_path)
        os.kill(first.pid, signal.SIGSTOP)  # a run that is paused is a run
        with pytest.raises(ConfigError, match=f"process {first.pid}"):
            lock_folder(tmp_path)


def test_the_lock_of_a_killed_process_is_taken_over_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with holder(tmp_path / "run.lock") as first:
        first.kill()
        first.wait()
    assert (tmp_path / "run.lock").exists()
    with caplog.at_level(logging.INFO), lock_folder(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert f"was left by process {first.pid} on {socket.gethostname()} since 20" in caplog.text
    assert os.listdir(tmp_path) == []


def test_a_forked_worker_neither_keeps_nor_removes_the_lock(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    pid = os.fork()
    if not pid:
        try:
            lock.close()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert (tmp_path / "lock").exists()
    code = "import sys; from pathlib import Path; from pipeline.locks import FileLock; FileLock(Path(sys.argv[1]))"
    other = [sys.executable, "-c", code, str(tmp_path / "lock")]
    assert b"LockedError" in subprocess.run(other, cwd=ROOT, capture_output=True).stderr
    worker = os.fork()
    if not worker:
        try:
            time.sleep(600)
        finally:
            os._exit(0)
    try:
        lock.close()
        assert subprocess.run(other, cwd=ROOT, capture_output=True).returncode == 0
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


@pytest.mark.parametrize(("host", "pid", "free"), [("elsewhere", 1, False), ("", 2**22 + 1, True), ("", 1, False)])
def test_where_the_file_system_has_no_locks_the_file_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, pid: int, free: bool
) -> None:
    def refuse(*_args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    file = tmp_path / "run.lock"
    file.write_text(json.dumps({"host": host or socket.gethostname(), "pid": pid, "since": "2026-01-01 00:00:00"}))
    if free:
        FileLock(file).close()
        assert not file.exists()
    else:
        with pytest.raises(LockedError, match=rf"process {pid} on .*as {file} says: remove it if that is not so"):
            FileLock(file)


NOTE = """
import sys
from pathlib import Path
from pipeline.evaluation import records
print("ready", flush=True)
sys.stdin.read(1)
for number in range(40):
    records.write_record(Path(sys.argv[1]), f"{sys.argv[2]}{number}", {"top1": 0.5})
"""


def test_commands_that_end_at_once_keep_each_others_results(tmp_path: Path) -> None:
    command = [sys.executable, "-c", NOTE, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    writers = [subprocess.Popen([*command, name], cwd=ROOT, **pipes) for name in "ab"]  # type: ignore[call-overload]
    for writer in writers:
        assert writer.stdout.readline() == b"ready\n"
    for writer in writers:
        writer.stdin.write(b".")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    assert len(read_records(tmp_path / "metrics.json")) == 80
    assert os.listdir(tmp_path) == ["metrics.json"]


def dead() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_whose_temporary_files_are_removed(tmp_path: Path) -> None:
    """Those of this host's dead processes, and old ones of other hosts; a live writer's stays, locked or not yet."""
    path, host = tmp_path / "file", socket.gethostname().replace("-", "_").replace(".", "_")
    stays = [tmp_path / f".file.{host}-{os.getpid()}-aa.partial", tmp_path / ".file.elsewhere-1-aa.partial"]
    goes = [tmp_path / f".file.{host}-{dead()}-aa.partial", tmp_path / ".file.elsewhere-2-aa.partial"]
    for partial in (*stays, *goes):
        partial.touch()
    os.utime(goes[1], (0, 0))
    remove_dead_partials(path)
    assert sorted(tmp_path.iterdir()) == sorted(stays)


def test_two_writers_of_a_folder_do_not_share_a_temporary_one(tmp_path: Path) -> None:
    def write_twice() -> None:
        with whole_folder(tmp_path / "folder") as first, whole_folder(tmp_path / "folder") as second:
            (first / "file").write_text("first")
            (second / "file").write_text("second")
            assert (first / "file").read_text() == "first"

    with pytest.raises(OSError, match="not empty"):
        write_twice()
    assert (tmp_path / "folder" / "file").read_text() == "second"
    host = socket.gethostname().replace("-", "_").replace(".", "_")
    (tmp_path / f".other.{host}-{dead()}-aa.partial").mkdir()
    with whole_folder(tmp_path / "other"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["folder", "other"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_without_hard_links_a_name_is_given_once_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(_path: Path, _target: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    with whole_file(tmp_path / "file", exclusive=True) as partial:
        partial.write_text("first")
    with pytest.raises(FileExistsError), whole_file(tmp_path / "file", exclusive=True) as partial:
        partial.write_text("second")
    assert (tmp_path / "file").read_text() == "first"
    assert os.listdir(tmp_path) == ["file"]
    write_text(tmp_path / "file", "third")
