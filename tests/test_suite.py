"""The suite itself: where its tests run, and how they start the command."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import forked
from tests.conftest import asks_for_gpu


def test_no_test_of_this_run_sees_a_gpu() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""  # nor does a process that a test starts
    assert torch.cuda.device_count() == 0


@pytest.mark.parametrize(
    ("markexpr", "asked"),
    [
        ("", False), ("not slow and not gpu", False), ("not (slow or gpu)", False), ("slow and not gpu", False),
        ("gpu", True), ("gpu and not slow", True),
    ],
)  # fmt: skip
def test_only_a_run_of_gpu_tests_sees_gpus(markexpr: str, asked: bool) -> None:
    assert asks_for_gpu(SimpleNamespace(option=SimpleNamespace(markexpr=markexpr))) == asked  # type: ignore[arg-type]


def test_a_forked_process_is_as_one_that_an_interpreter_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folder, environment, words, random numbers, signals, group, exit handlers; both ways print the same."""
    code = """
import atexit, os, random, signal, sys, threading
import numpy, torch
def is_open(number):
    try:
        device = os.fstat(number).st_rdev
    except OSError:
        return False
    return device != os.stat("/dev/urandom").st_rdev  # some library may keep it open
atexit.register(print, "at exit")
threading.Timer(0.8, print, ["a thread is waited for"]).start()
handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE)]
print(sys.argv[1:], os.getcwd(), sorted(os.environ.items()), handlers, os.umask(0), sys.stdin.read())
print(os.getsid(0) == os.getpid(), torch.get_num_threads(), list(filter(is_open, range(1024))))
print(torch.ones(3000, 3000).sum().item(), file=sys.stderr)
print(random.random(), numpy.random.rand(), torch.rand(()).item(), file=open(sys.argv[1], "a"))
sys.exit(7)
"""
    monkeypatch.chdir(tmp_path)
    args = [sys.executable, "-c", code, "drawn"]
    for more, new in (({"OMP_NUM_THREADS": "1"}, False), ({}, True)):
        keys: dict[str, Any] = {"env": {"LC_ALL": "C.UTF-8", **more}, "start_new_session": new}
        started = subprocess.run(args, stdin=subprocess.DEVNULL, capture_output=True, **keys)
        for _ in range(2):
            process = forked.run(args, **keys)
            assert (process.returncode, process.stdout, process.stderr) == (7, started.stdout, started.stderr)
    assert len(set((tmp_path / "drawn").read_text().split())) == 18


def test_a_forked_process_fails_and_falls_as_one_that_an_interpreter_starts() -> None:
    endings = [
        "raise KeyError('lost')", "import sys; sys.exit('a last word')", "import os; os.kill(os.getpid(), 9)",
        "import time, signal; signal.alarm(1); time.sleep(60)", "import sys; sys.exit()",
    ]  # fmt: skip
    for code in endings:
        args = [sys.executable, "-c", code]
        started, process = subprocess.run(args, capture_output=True, text=True), forked.run(args, text=True)
        assert process.returncode == started.returncode, code
        assert process.stderr.splitlines()[-1:] == started.stderr.splitlines()[-1:], code
    with pytest.raises(subprocess.TimeoutExpired):
        forked.run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.1)
