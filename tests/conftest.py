"""What tests share: where they run, what they draw, small real pictures, and the real data when it is there."""

import gc
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest

# A thread without work sleeps, here and in what tests start: else each small sum of torch keeps all cores busy.
# OpenMP reads it when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch

from tests import forked
from tests.pictures import smooth_picture

_patch = pytest.MonkeyPatch()  # for the whole session
_thaw = gc.unfreeze
_ended = 0  # tests
_ROOM = 8 << 30  # bytes; a run of the fast suite takes a quarter of it
hypothesis.settings.register_profile("same", derandomize=True)
REAL_DATA = Path(os.environ.get("MRMAE_DATA", Path(__file__).parents[1] / "../shared/data")).resolve()


def _keep_temporary_files_in_memory() -> None:
    """Where there is room: on a disk each fsync and removal costs milliseconds, and there are hundreds of thousands.

    A TMPDIR that is set already is used.
    """
    memory = Path("/dev/shm")
    if "TMPDIR" in os.environ or not memory.is_dir() or shutil.disk_usage(memory).free < _ROOM:
        return
    folder = memory / f"mrmae-tests-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid == os.getuid():
        os.environ["TMPDIR"] = str(folder)
        tempfile.tempdir = None


def pytest_configure(config: pytest.Config) -> None:
    """Tests see a GPU only where `-m gpu` asks for those that need one: the others hold what a CPU computes.

    torch reads the variable when it first looks for a GPU, which no import does. Processes that tests start, and those
    of pytest-xdist, inherit it.
    """
    _keep_temporary_files_in_memory()
    if config.option.markexpr.split()[:1] != ["slow"] and not config.getoption("--hypothesis-profile"):
        # The same examples each time: what fails was changed. The slow suite draws new ones.
        hypothesis.settings.load_profile("same")
    if not asks_for_gpu(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish() -> None:
    """No collection of garbage walks what is imported: that took a fifth of the suite's CPU time.

    So a run of training, which freezes what it finds and thaws it in the end, must not thaw either.
    """
    _collect_all()
    _patch.setattr(gc, "unfreeze", lambda: None)


def pytest_runtest_logfinish() -> None:
    """Now and then all garbage goes: what trainings froze holds open files."""
    global _ended
    _ended += 1
    if _ended % 500 == 0:
        _collect_all()


def _collect_all() -> None:
    _thaw()
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    _patch.undo()
    _thaw()  # libraries tell of objects that are left at the end
    forked.close()


def asks_for_gpu(config: pytest.Config) -> bool:
    return config.option.markexpr.split()[:1] == ["gpu"]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _seed()
    tried = "MRMAE_TEST_DEVICE" in os.environ  # on a CPU, to try the tests themselves
    if item.get_closest_marker("gpu") is not None and not tried and not torch.cuda.is_available():
        pytest.skip("no GPU here" if asks_for_gpu(item.config) else "GPUs are hidden: `make test-gpu` runs this one")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    _seed()  # fixtures that others share draw in the first test that asks for them


def _seed() -> None:
    """A test draws the same whatever ran before it, and in whichever process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Micro models are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def forked_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stage starts by subprocess.Popen is forked: the same command line, without an interpreter's seconds."""
    monkeypatch.setattr(subprocess, "Popen", forked.Popen)


@pytest.fixture
def real_data() -> Path:
    """Imagenette, COCO samples and a real ViT-Ti/16; see CONTRIBUTING.md for where they come from."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"needs the real images and teacher in MRMAE_DATA ({REAL_DATA} isn't there)")
    return REAL_DATA


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-folder tree: 3 classes × 8 JPEGs of different sizes."""
    root = tmp_path_factory.mktemp("tree")
    for number in range(24):
        folder = root / f"class{number % 3}"
        folder.mkdir(exist_ok=True)
        smooth_picture(number, 40 + number, 64 - number).save(folder / f"{number:02d}.jpg", quality=90)
    return root
