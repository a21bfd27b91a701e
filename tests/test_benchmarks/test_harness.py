"""What every benchmark rests on, proved once: turns, paired ratios, the bench and what it leaves behind."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import harness
from benchmarks.configs.decode import BenchmarkDecodeConfig
from benchmarks.harness import Bench, by_turns, count_gmacs, median_and_range, open_bench, open_or_draw
from pipeline.configs.data import DataConfig
from pipeline.errors import ConfigError


class Clock:
    """Time that goes by only when a lane says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls = 0.0, list[str]()
        monkeypatch.setattr(harness.time, "perf_counter", lambda: self.now)

    def job(self, name: str, *seconds: float) -> Callable[[], None]:
        """A job that takes these seconds, call by call."""
        left = iter(seconds)

        def work() -> None:
            self.calls.append(name)
            self.now += next(left)

        return work


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(torch.device("cpu"), torch.float32, tmp_path)


def test_lanes_take_turns_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
    clock = Clock(monkeypatch)
    jobs = {"bare": clock.job("bare", 90, 1, 2, 4), "ours": clock.job("ours", 50, 2, 8, 2)}
    rounds = by_turns(bench.lanes(jobs), rounds=3)
    assert clock.calls == ["bare", "ours"] * 4
    assert rounds.seconds == {"bare": [1, 2, 4], "ours": [2, 8, 2]}
    assert rounds.median("bare") == 2
    assert rounds.rates(10) == {"bare": 5, "ours": 5}


def test_a_ratio_is_taken_within_each_round(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
    """A machine that is slow for one round slows both lanes down: the medians' own ratio would be 1 here."""
    clock = Clock(monkeypatch)
    jobs = {"bare": clock.job("bare", 0, 1, 2, 40), "ours": clock.job("ours", 0, 2, 1, 10)}
    rounds = by_turns(bench.lanes(jobs), rounds=3)
    assert rounds.median("bare") / rounds.median("ours") == 1
    assert rounds.ratio("bare", "ours") == {"ratio": 2, "range": [0.5, 4]}


def test_the_spread_has_three_decimals() -> None:
    assert median_and_range([1 / 3, 2 / 3, 1.0]) == (0.667, [0.333, 1.0])


def test_work_that_a_device_was_given_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A job returns as soon as it is queued; the clock is read before and after the device is done."""
    clock, queue = Clock(monkeypatch), [7.0]  # seconds that somebody else left in the queue

    def synchronize(device: torch.device) -> None:
        clock.now += sum(queue)
        queue.clear()

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    bench = Bench(torch.device("cuda", 0), torch.bfloat16, tmp_path)
    assert bench.seconds(lambda: queue.append(3.0)) == 3


def test_a_report_has_machine_config_and_figures(tmp_path: Path) -> None:
    config = BenchmarkDecodeConfig(data=DataConfig(path="images"))
    threads = torch.get_num_threads()
    with open_bench(device="cpu", threads=threads + 1, folder=tmp_path) as bench:
        (bench.folder / "scratch").touch()
        answer = json.loads(json.dumps(bench.report(config, {"rate": 7})))
    assert answer["rate"] == 7
    assert answer["config"]["data"]["path"] == "images"
    assert answer["machine"]["device"] == "cpu"
    assert answer["machine"]["precision"] == "fp32"
    assert answer["machine"]["threads"] == threads + 1
    assert answer["machine"]["libraries"]["torch"] == torch.__version__
    assert torch.get_num_threads() == threads
    assert list(tmp_path.iterdir()) == []


def test_a_failed_benchmark_leaves_nothing_behind(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), open_bench(threads=threads + 1, folder=tmp_path):
        raise ZeroDivisionError
    assert torch.get_num_threads() == threads
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("keys", "message"), [({"device": "cuda"}, "device=cuda"), ({"precision": "bf16"}, "bf16")])
def test_what_the_machine_lacks_is_refused(keys: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message), open_bench(**keys):
        pass


def test_images_are_those_given_or_drawn(image_tree: Path, tmp_path: Path) -> None:
    assert len(open_or_draw(DataConfig(path=str(image_tree)), 5, tmp_path / "a")) == 5
    assert len(open_or_draw(DataConfig(path=str(image_tree), limit=3), 5, tmp_path / "a")) == 3
    assert not (tmp_path / "a").exists()
    assert len(open_or_draw(None, 2, tmp_path / "b", image_size=32)) == 2
    with Image.open(tmp_path / "b" / "00000.jpg") as image:
        assert image.size == (32, 32)


def test_multiply_adds_are_counted() -> None:
    left, right = torch.ones(100, 200), torch.ones(200, 300)
    assert count_gmacs(lambda: left @ right) == pytest.approx(100 * 200 * 300 / 1e9)
