import pytest

from benchmarks.configs.pretrain import BenchmarkPretrainConfig
from benchmarks.pretrain import run
from tests.test_benchmarks.conftest import VIT_TI
from tests.test_stages.conftest import MICRO


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_figures_are_there_and_make_sense(store: str) -> None:
    config = {
        "student": MICRO,
        "teachers": [VIT_TI],
        "images": 16,
        "batch_size": 8,
        "rounds": 3,
        "store": store,
        "threads": 1,
    }
    figures = run(BenchmarkPretrainConfig.model_validate(config))
    lanes = figures["teachers"]["0"]
    assert set(lanes["images_per_s"]) == {"mae", "cached", "cached_cross", "online"}
    low, high = lanes["cached_over_mae"]["range"]
    assert 0 < low <= lanes["cached_over_mae"]["ratio"] <= high
    assert lanes["online_over_cached"]["ratio"] > 1  # a ViT-Ti's forward on top of a micro student's step
    assert lanes["ceiling"] == pytest.approx(1 + lanes["teacher_gmacs"] / lanes["student_step_gmacs"], rel=0.05)
    for where in ("loader", "worker"):
        assert 0 < figures["stored_views"][f"{where}_over_bare_decoding"]["ratio"] < 2
