"""A file or a folder is there whole or not at all, whoever else writes it and wherever a writer is killed."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from pipeline import files
from pipeline.errors import ConfigError
from pipeline.files import append_line, remove_dead_partials, whole_file, whole_folder, write_text


def test_a_file_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with whole_file(path) as partial:
        partial.write_text("half")
        assert not path.exists()
        partial.write_text("whole")
    assert path.read_text() == "whole"
    assert os.listdir(path.parent) == ["file"]


def test_an_error_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "former")

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), whole_file(path) as partial:
        fail(partial)
    assert path.read_text() == "former"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
@pytest.mark.parametrize("replaced", [False, True], ids=["written", "put in its place"])
def test_the_mode_is_that_of_a_new_file(tmp_path: Path, umask: int, replaced: bool) -> None:
    """Also where a library renames a file of its own, for its owner alone, to the temporary path."""
    former = os.umask(umask)
    try:
        with whole_file(tmp_path / "file") as partial:
            if replaced:
                other = tmp_path / "other"
                other.touch(0o600)
                other.rename(partial)
    finally:
        os.umask(former)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


def test_exclusive_refuses_to_replace(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "former")
    with pytest.raises(FileExistsError), whole_file(tmp_path / "file", exclusive=True) as partial:
        partial.write_text("another")
    assert (tmp_path / "file").read_text() == "former"
    assert os.listdir(tmp_path) == ["file"]


def test_durable_content_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("fsync") or fsync(descriptor))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    write_text(tmp_path / "file", "content", durable=True)
    write_text(tmp_path / "file", "content")
    assert calls == ["fsync", "replace", "replace"]


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """Many at once, each of which also clears away what dead ones left: one whole content stays, and no error comes."""
    path = tmp_path / "file"

    def write(letter: str) -> None:
        for _ in range(50):
            write_text(path, letter * 1000)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))  # raises what a writer raised
    assert path.read_text() in {letter * 1000 for letter in "abcd"}
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_is_cleared_away_before_its_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, calls = fcntl.flock, list[int]()

    def late(file: object, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:  # another process takes the unlocked file for a dead writer's
            next(tmp_path.glob(".file.*.partial")).unlink()
        lock(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", late)
    write_text(tmp_path / "file", "content")
    assert (tmp_path / "file").read_text() == "content"
    assert calls == [fcntl.LOCK_EX, fcntl.LOCK_EX, fcntl.LOCK_UN]


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.files import whole_file
with whole_file(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_goes_and_a_writer_at_work_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert len(list(tmp_path.glob(".file.*.partial"))) == 1
    with whole_file(path) as partial:
        remove_dead_partials(path)
        assert list(tmp_path.iterdir()) == [partial]
        partial.write_text("whole")
    assert path.read_text() == "whole"


def test_a_folder_appears_at_the_end(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "folder", durable=True) as partial:
        (partial / "file").write_text("content")
        assert not (tmp_path / "folder").exists()
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*")] == ["folder", "folder/file"]


def test_an_error_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), whole_folder(tmp_path / "folder") as partial:
        partial.mkdir()
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_or_socket_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root, `output=/dev/null` made a regular file of it, which every program of the machine then filled."""
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    os.mkfifo("pipe")
    Path("link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    for path in (Path("pipe"), Path("link"), Path("socket")):
        kind = path.stat().st_mode
        with pytest.raises(ConfigError, match="is no regular file, which it would become: choose another name"):
            write_text(path, "content")
        assert path.stat().st_mode == kind
    assert Path("link").is_symlink()


@pytest.mark.parametrize("torn", ["", '{"step": 2', "x" * 9000])
def test_a_line_follows_whole_lines_alone(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "rows"
    append_line(path, "ein Bär")
    with path.open("a") as file:
        file.write(torn)
    append_line(path, "last", durable=True)
    assert path.read_text(encoding="utf-8") == "ein Bär\nlast\n"


def test_a_first_line_that_was_cut_short_goes(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text("torn")
    append_line(path, "whole")
    assert path.read_text() == "whole\n"


def test_a_line_whose_write_fails_leaves_the_former_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where half of it came through: a second attempt would put the whole line behind that half."""

    class Full(FileIO):
        def write(self, data: Any, /) -> int:
            super().write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "rows"
    append_line(path, "former")
    monkeypatch.setattr(files, "FileIO", Full)
    with pytest.raises(OSError, match="No space left"):
        append_line(path, "a row")
    assert path.read_text() == "former\n"


def test_a_line_that_comes_through_in_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(FileIO):
        def write(self, data: Any, /) -> int:
            return super().write(data[:3])

    monkeypatch.setattr(files, "FileIO", Slow)
    append_line(tmp_path / "rows", "a longer row")
    assert (tmp_path / "rows").read_text() == "a longer row\n"
