"""Sizes are foreseen within a few percent; the three stages of this wing answer in JSON."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from benchmarks import cache as benchmark_cache
from pipeline.cache import budget, create_cache, open_writer
from pipeline.cache.budget import estimate_bytes, readable, require_room
from pipeline.configs.cache import CacheInput
from pipeline.errors import CacheDamage, CacheError, ConfigError, TeacherError
from stages import cache_info, plan
from tests.test_pipeline.cache.samples import STORES, make_cache, make_header, make_shard


@pytest.fixture(scope="module", autouse=True)
def teachers_once() -> Iterator[None]:
    """Each teacher is built for its figures once: plans are the subject here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "describe_teacher", functools.cache(plan.describe_teacher))
        yield


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("quantiser", ["int8", "int4", "codes", "float16", "float32"])
def test_the_estimate_is_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str, quantiser: str
) -> None:
    count = 400 if quantiser == "codes" else 40  # small records: the ends of four tars must not count
    header = make_header(
        store,
        quantiser_name=quantiser,
        dim=128,
        grid=[10, 10],
        dataset={"source": "", "kind": "", "count": count, "digest": ""},
        samples_per_shard=count // 2,
    )
    path = make_cache(tmp_path / "cache", header)
    written = sum(f.stat().st_size for f in path.rglob("*") if f.parent.name not in ("cache", "commits", "index"))
    monkeypatch.setattr(budget, "JPEG_BYTES", 200)
    expected = count * 2 * estimate_bytes(header.rows, 128, store, quantiser, attention=100)
    assert written == pytest.approx(expected, rel=0.08, abs=20_000)


def test_a_disk_without_room_is_refused(tmp_path: Path) -> None:
    require_room(tmp_path / "not" / "yet", 1)
    with pytest.raises(CacheError, match=r"needs about 1 PB and its disk has .* free"):
        require_room(tmp_path, 10**15)


def test_readable() -> None:
    assert [readable(n) for n in (0, 999, 1000, 193_949_466_295)] == ["0 B", "999 B", "1 kB", "193.9 GB"]


def test_plan_of_imagenet() -> None:
    answer = plan.run(plan.PlanConfig())
    assert answer["size"] == "193.9 GB"
    assert answer["saving_ceiling"] == pytest.approx(1.6, abs=0.01)
    assert answer["teacher_gmac"] == pytest.approx(17.6, abs=0.1)
    assert answer["student_step_gmac"] == pytest.approx(29, abs=0.1)
    assert answer["extraction_gpu_hours"] == pytest.approx(1_281_167 / answer["extraction_rate"] / 3600)
    assert plan.run(plan.PlanConfig(quantiser="int4"))["size"] == "97.52 GB"
    codes = plan.run(plan.PlanConfig(quantiser="codes", attention="none"))
    assert (codes["size"], codes["bytes_per_view"]) == ("595.7 MB", 196 * 2 + 73)
    half = plan.run(plan.PlanConfig(quantiser="float16", views=2))
    assert half["bytes"] == pytest.approx(2 * 386e9, rel=0.01)
    json.dumps(answer)


@pytest.mark.parametrize(
    ("keys", "ratio"),
    [({}, 1.0), ({"predict_share": 0.25}, 0.953), ({"decoder": "cross"}, 0.581),
     ({"decoder": "cross", "predict_share": 0.5}, 0.691), ({"decoder": "cross", "predict_share": 1.0}, 0.801),
     ({"decoder": "cross", "student": "mrmae_convvit_base_patch16"}, 0.641)],
)  # fmt: skip
def test_plan_follows_the_decoder(keys: dict[str, Any], ratio: float) -> None:
    answer = plan.run(plan.PlanConfig.model_validate(keys))
    assert answer["step_over_mae"] == pytest.approx(ratio, abs=0.001)
    step = answer["student_step_gmac"]
    assert answer["saving_ceiling"] == pytest.approx((step + answer["teacher_gmac"]) / step)


def test_plan_names_the_slower_side() -> None:
    rates = {"samples": 360_000, "epochs": 2, "gpus": 2, "cores": 5, "extraction_rate": 1000.0, "photo_rate": 100.0}
    photos = plan.run(plan.PlanConfig.model_validate({**rates, "training_rate": 4000.0}))
    assert (photos["extraction_limit"], photos["extraction_hours"]) == ("decoding", pytest.approx(0.1))
    assert (photos["training_limit"], photos["training_hours"]) == ("decoding", pytest.approx(0.2))
    assert photos["read_bytes_per_second"] == pytest.approx(1000 * photos["bytes_per_view"], rel=1e-4)
    stored = plan.run(plan.PlanConfig.model_validate({**rates, "store": "webdataset", "training_rate": 4000.0}))
    assert (stored["training_limit"], stored["training_hours"]) == ("step", pytest.approx(0.05))
    many = plan.run(plan.PlanConfig.model_validate({**rates, "views": 4}))
    assert (many["extraction_limit"], many["extraction_hours"]) == ("teacher", pytest.approx(0.2))


def test_plans_hours_follow_cards_student_and_teacher() -> None:
    def hours(**keys: Any) -> tuple[float, float]:
        answer = plan.run(plan.PlanConfig.model_validate({"store": "webdataset", "cores": 1000, **keys}))
        return answer["extraction_hours"], answer["training_hours"]

    extraction, training = hours()
    assert hours(gpus=16) == pytest.approx((extraction / 2, training / 2))
    assert hours(gpu="A100") == pytest.approx((extraction * 989 / 312, training * 989 / 312))
    assert hours(peak_tflops=494.5) == pytest.approx((2 * extraction, 2 * training))
    assert hours(student="mrmae_vit_tiny_patch16")[1] < training / 3
    assert hours(teacher="clip_vitl14")[0] == pytest.approx(extraction * 61.5 / 17.6, rel=0.01)
    with pytest.raises(ConfigError, match=r"gpu=Abacus isn't known here: give peak_tflops=\.\.\."):
        hours(gpu="Abacus")


def test_plan_agrees_with_what_an_h200_did() -> None:
    answer = plan.run(plan.PlanConfig(gpu="H200", gpus=1, cores=1000))
    assert answer["training_rate"] == pytest.approx(5294, rel=0.02)
    assert answer["training_hours_live_teacher"] / answer["training_hours"] == pytest.approx(1.52, rel=0.1)
    # An assumed 16% of the card's 989 TFLOP/s at 35.1 GFLOP a view.
    assert answer["extraction_rate"] == pytest.approx(4505, rel=0.001)


def test_plan_counts_the_disk_where_its_rate_is_given() -> None:
    slow = plan.run(plan.PlanConfig.model_validate({"disk_rate": "100MB"}))
    assert (slow["extraction_limit"], slow["training_limit"]) == ("disk", "disk")
    assert slow["training_hours"] == pytest.approx(1_281_167 * 400 * slow["bytes_per_view"] / 100e6 / 3600)
    assert "disk_rate" in slow["training_moved_by"]
    assert slow["disk_rate_from"] == "given"
    assert plan.run(plan.PlanConfig())["disk_rate_from"].startswith("not counted: give disk_rate=")


@pytest.mark.parametrize(
    ("text", "number"), [("1.28M", 1_280_000), ("300k", 300_000), ("1B", 10**9), (1e6, 10**6), (12, 12)]
)
def test_plan_reads_numbers_as_people_write_them(text: object, number: int) -> None:
    assert plan.PlanConfig.model_validate({"samples": text}).samples == number


@pytest.mark.parametrize(
    ("text", "number"),
    [("50GB", 50 * 10**9), ("1.5T", 15 * 10**11), ("700 MB", 7 * 10**8), ("30000000000B", 3 * 10**10)],
)
def test_amounts_of_bytes_are_read_as_people_write_them(text: str, number: int) -> None:
    assert CacheInput.model_validate({"path": "cache", "local_limit": text}).local_limit == number
    assert plan.PlanConfig.model_validate({"disk_rate": text}).disk_rate == number


@pytest.mark.parametrize("text", ["many", "1.5", "-3M", 0])
def test_other_amounts_of_bytes_are_refused(text: object) -> None:
    with pytest.raises(ValidationError, match="local_limit"):
        CacheInput.model_validate({"path": "cache", "local_limit": text})


@pytest.mark.parametrize("text", ["many", "1.5", "-3M", 0])
def test_plan_refuses_other_numbers_of_samples(text: object) -> None:
    with pytest.raises(ValidationError, match="samples"):
        plan.PlanConfig.model_validate({"samples": text})


def test_every_limit_of_a_plan_names_its_keys_and_every_rate_its_source() -> None:
    answer = plan.run(plan.PlanConfig(cores=1, extraction_rate=1e9, photo_rate=100.0))
    assert (answer["extraction_limit"], answer["training_limit"]) == ("decoding", "decoding")
    assert "cores" in answer["extraction_moved_by"]
    assert "store=webdataset" in answer["training_moved_by"]
    assert (answer["extraction_rate_from"], answer["photo_rate_from"]) == ("given", "given")
    assert "31% of 989 dense bf16 TFLOP/s (H100, data sheet); measured on one H200" in answer["training_rate_from"]
    assert "measured" in answer["stored_rate_from"]


def test_plan_of_something_unknown() -> None:
    with pytest.raises(TeacherError, match="unknown teacher 'gpt': choose one that `mrmae teachers` lists"):
        plan.run(plan.PlanConfig(teacher="gpt"))
    with pytest.raises(TeacherError, match="no figures without its run: name a teacher of timm or open_clip"):
        plan.run(plan.PlanConfig(teacher="mrmae:runs/x"))


def test_plan_says_whether_masks_can_be_drawn_by_attention() -> None:
    seeing, blind, other = (
        plan.run(plan.PlanConfig(teacher=name, samples=1000))
        for name in ("siglip2_vitb16", "aimv2_vitl14", "timm:vit_tiny_patch16_224")
    )
    assert seeing["focus"] == other["focus"] == "by attention"
    assert "mask.focus=random" in blind["focus"]
    assert blind["bytes"] < plan.run(plan.PlanConfig(teacher="clip_vitl14", samples=1000))["bytes"]


def test_cache_info(tmp_path: Path, store: str) -> None:
    header = make_header(store)
    create_cache(tmp_path, header)
    for shard in (0, 1):
        data = make_shard(header, shard, {5: "bad"})
        data.fidelity = {"tokens": 24, "nmse_mean": 1e-5, "nmse_worst": 2e-5, "cosine_mean": 1, "cosine_worst": 0.999}
        open_writer(tmp_path).write_shard(shard, data)
    answer = cache_info.run(cache_info.CacheInfoConfig(path=tmp_path))
    assert (answer["committed"], answer["shards"], answer["complete"]) == (2, 3, False)
    assert answer["missing_shards"] == [2]
    assert answer["tombstones"] == 1
    assert answer["tombstone_list"][0]["error"] == "bad"
    assert answer["fidelity"]["tokens"] == 48
    assert answer["seconds"] == 3.0
    assert answer["bytes_per_view"] > 100
    assert answer["reads"] == "one pread and one checksum a record, 48 bytes of tokens"
    json.dumps(answer)


def test_cache_info_of_damage(cache: Path) -> None:
    (cache / "commits" / "000001.json").write_text("{}")
    with pytest.raises(CacheDamage, match="shard 1"):
        cache_info.run(cache_info.CacheInfoConfig(path=cache))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_benchmark_measures_both_stores_and_given_caches(tmp_path: Path) -> None:
    """The figures themselves are the benchmark's business; here it runs and says what it should."""
    config = benchmark_cache.BenchmarkCacheConfig(
        folder=tmp_path, samples=16, samples_per_shard=8, grid=2, dim=8, image_bytes=100, repeats=2, shards=(2, 5),
        shard_records=10,
    )  # fmt: skip
    answer = benchmark_cache.run(config)
    for store in ("zarr", "webdataset"):
        many = answer[store].pop("shards")
        assert [many[lane]["reads_per_record"] for lane in ("2", "5")] == 2 * [3 if store == "zarr" else 1]
        assert many["2"]["over_fewest"] == 1
        assert many["5"]["bytes_per_record"] == pytest.approx(48 if store == "zarr" else 2170, rel=0.05)
        assert set(answer[store]) == {"read", "read_tight", "npy", "verify", "write"}
        assert all(0 < figure["range"][0] <= figure["ratio"] for figure in answer[store].values())
    assert list(tmp_path.iterdir()) == []
    given = make_cache(tmp_path / "cache", make_header("zarr"), {5: "bad"})
    answer = benchmark_cache.run(config.model_copy(update={"path": given}))
    assert set(answer["zarr"]) == {"read", "read_tight", "npy", "verify"}
    json.dumps(answer)
