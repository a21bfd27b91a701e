"""Where a result comes from: enough to make it again, and nothing about the machine's user."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import provenance
from pipeline.provenance import describe_process


def test_it_names_command_device_and_versions_but_no_host_and_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/somebody/bin/mrmae", "knn", "init=runs/my run"])
    facts = describe_process()
    assert facts["command"] == "mrmae knn 'init=runs/my run'"
    assert facts["device"] == f"CPU, {torch.get_num_threads()} threads"
    assert facts["processes"] == 1
    assert facts["versions"]["torch"] == torch.__version__
    text = json.dumps(facts)
    assert "somebody" not in text
    assert f'"{socket.gethostname()}"' not in text


def test_a_notebooks_words_are_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/ipykernel_launcher.py", "-f", "/home/somebody/kernel.json"])
    assert describe_process()["command"] == "ipykernel_launcher.py"


def test_the_commit_is_the_checkouts(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    assert describe_process()["commit"] == (done.stdout.strip() or None)
    assert provenance._commit(tmp_path) is None
