from benchmarks.configs.extract import BenchmarkExtractConfig
from benchmarks.extract import run
from pipeline.config import load_config
from tests.test_benchmarks.conftest import VIT_TI


def test_figures_are_there_and_make_sense() -> None:
    config = {
        "teacher": VIT_TI, "views": {"image_size": 64}, "images": 16, "batch_size": 8, "rounds": 2, "workers": 0,
        "free_views": 48, "threads": 1,
    }  # fmt: skip
    figures = run(BenchmarkExtractConfig.model_validate(config))
    low, high = figures["stage"]["range"]
    assert 0 < low <= figures["stage"]["ratio"] <= high
    assert figures["stage"]["stage_views_per_s"] > 0
    assert figures["render"]["pillow_views_per_s"] > 0 < figures["render"]["torch_views_per_s"]
    for store in ("zarr", "webdataset"):
        free = figures["free"][store]
        assert free["main_thread_views_per_s"] > figures["stage"]["stage_views_per_s"]
        assert free["views_per_s"] > 0
    assert 0 < figures["shared"]["ratio"] < 1.5
    assert 0.9 < figures["bf16"]["cosine_mean"] < 1


def test_a_named_teacher_has_its_own_weights() -> None:
    teacher = load_config(BenchmarkExtractConfig, None, ["teacher.spec=clip_vitb16"]).teacher
    assert teacher is not None
    assert (teacher.spec, teacher.weights) == ("clip_vitb16", None)
