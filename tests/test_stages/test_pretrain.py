import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.assembly import caches, knowledge
from pipeline.assembly.knowledge import CachedKnowledge, LiveKnowledge
from pipeline.assembly.samples import PretrainBatch
from pipeline.cache import open_cache
from pipeline.configs.data import MaskConfig, ViewConfig
from pipeline.data.masks import MaskSampler
from pipeline.errors import CacheError, CheckpointError, ConfigError, DataError, TrainingError
from pipeline.teachers import build_teacher
from pipeline.training.checkpoint import load_checkpoint
from pipeline.training.engine import _Loop
from stages import knn, pretrain
from tests.test_stages.conftest import MICRO, TEACHER, pretrain_config

Make = Callable[..., Path]


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows(output)]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(max((output / "checkpoints").glob("step-*")) / "model.safetensors")


def inputs(cache: Path, images: Path) -> dict[str, Any]:
    data = {"path": str(images), "workers": 0}
    return {"cache": {"path": str(cache)}} | ({} if cache.name == "webdataset" else {"data": data})


def test_both_losses_fall(cache: Path, image_tree: Path, tmp_path: Path) -> None:
    config = pretrain_config(tmp_path / "run", max_steps=40, epochs=40, **inputs(cache, image_tree))
    pretrain.run(config)
    written = rows(tmp_path / "run")
    assert written[-1]["pixel_loss"] < 0.95 * written[0]["pixel_loss"]
    assert written[-1]["mimic_loss"] < 0.8 * written[0]["mimic_loss"]
    assert {"lr", "images_per_s", "data_wait", "epoch"} <= set(written[-1])
    assert all(row["memory_gib"] > 0 for row in written)
    assert (tmp_path / "run/config.yaml").is_file()


class Killed(BaseException):
    """Like SIGKILL, nothing in the program handles it."""


class Steps:
    """Watches a run's steps: which it trained, of which samples; and kills it at the start of one."""

    def __init__(self, patch: pytest.MonkeyPatch, kill_at: int | None = None) -> None:
        self.trained: list[int] = []
        self.samples: list[list[int]] = []  # of each micro-batch
        step, losses = _Loop.train_step, pretrain._Losses.__call__

        def train_step(loop: Any, number: int, *rest: Any) -> None:
            if number == kill_at:
                raise Killed
            self.trained.append(number)
            step(loop, number, *rest)

        def call(of: Any, student: Any, batch: PretrainBatch) -> Any:
            self.samples.append(batch.indices.tolist())
            return losses(of, student, batch)

        patch.setattr(_Loop, "train_step", train_step)
        patch.setattr(pretrain._Losses, "__call__", call)


def killed_and_resumed(output: Path, kill_at: int, **keys: Any) -> Steps:
    """What the second start trained."""
    with pytest.MonkeyPatch.context() as patch:
        Steps(patch, kill_at)
        with pytest.raises(Killed):
            pretrain.run(pretrain_config(output, **keys))
    with pytest.MonkeyPatch.context() as patch:
        steps = Steps(patch)
        pretrain.run(pretrain_config(output, **keys))
    return steps


@pytest.mark.parametrize("stop", [3, 4])  # in the middle of an epoch, and at its end
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    cache: Path, image_tree: Path, tmp_path: Path, stop: int
) -> None:
    common = {**inputs(cache, image_tree), "accum_iter": 2, "batch_size": 6, "grad_norms_every": 0}
    pretrain.run(pretrain_config(tmp_path / "whole", **common))
    resumed = killed_and_resumed(tmp_path / "killed", stop + 1, checkpoint_every=stop, **common)
    assert resumed.trained == list(range(stop, 6))  # it went on, it didn't begin again
    assert len(resumed.samples) == 2 * (6 - stop)
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


CROSS = {**MICRO, "decoder": "cross"}  # predicts 4 of 16 cells


def test_a_cross_decoder_resumes_bit_for_bit_and_workers_change_nothing(
    make_cache: Make, image_tree: Path, tmp_path: Path
) -> None:
    common = {**inputs(make_cache(), image_tree), "student": CROSS, "grad_norms_every": 0}
    pretrain.run(pretrain_config(tmp_path / "whole", **common))
    resumed = killed_and_resumed(tmp_path / "killed", 4, checkpoint_every=3, **common)
    assert resumed.trained == [3, 4, 5]
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    common["data"] = {"path": str(image_tree), "workers": 2}
    pretrain.run(pretrain_config(tmp_path / "two", **common))
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed") == losses(tmp_path / "two")
    common["student"] = {**CROSS, "predict_share": 0.5}
    with pytest.raises(CheckpointError, match="holds a run with student="):
        pretrain.run(pretrain_config(tmp_path / "two", **common))


def test_a_run_from_before_masks_were_disjoint_goes_on_with_its_own(
    make_cache: Make, image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {**inputs(make_cache(), image_tree), "mask": {"masks_per_sample": 4}, "grad_norms_every": 0}
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "recorded_identity", lambda output: {"mask": {}})
        pretrain.run(pretrain_config(tmp_path / "before", **common))
        with pytest.MonkeyPatch.context() as inner:
            Steps(inner, kill_at=4)
            with pytest.raises(Killed):
                pretrain.run(pretrain_config(tmp_path / "resumed", checkpoint_every=3, **common))
    pretrain.run(pretrain_config(tmp_path / "resumed", checkpoint_every=3, **common))
    assert losses(tmp_path / "resumed") == losses(tmp_path / "before")
    pretrain.run(pretrain_config(tmp_path / "new", **common))
    assert losses(tmp_path / "new") != losses(tmp_path / "before")
    new = load_checkpoint(max((tmp_path / "new/checkpoints").glob("step-*"))).identity["mask"]
    assert new["disjoint"]


def test_block_order_shows_a_shard_after_the_other_also_after_a_resume(
    make_cache: Make, image_tree: Path, tmp_path: Path
) -> None:
    """A window of one shard of eight samples, which is a batch."""
    common = {**inputs(make_cache(), image_tree), "epochs": 2, "max_steps": None, "grad_norms_every": 0}
    common["order"] = {"kind": "block", "window": 1}
    with pytest.MonkeyPatch.context() as patch:
        whole = Steps(patch)
        pretrain.run(pretrain_config(tmp_path / "whole", **common))
    shards = [{index // 8 for index in batch} for batch in whole.samples]
    assert all(len(shard) == 1 for shard in shards)
    assert set.union(*shards[:3]) == set.union(*shards[3:]) == {0, 1, 2}
    assert whole.samples[0] != sorted(whole.samples[0])  # shuffled inside it
    resumed = killed_and_resumed(tmp_path / "killed", 5, checkpoint_every=4, **common)
    assert (resumed.trained, resumed.samples) == ([4, 5], whole.samples[4:])
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert all(
        torch.equal(one, weights(tmp_path / "killed")[name]) for name, one in weights(tmp_path / "whole").items()
    )


def test_workers_change_nothing(cache: Path, image_tree: Path, tmp_path: Path) -> None:
    common = inputs(cache, image_tree)
    pretrain.run(pretrain_config(tmp_path / "none", **common))
    common["data"] = {"path": str(image_tree), "workers": 3}
    pretrain.run(pretrain_config(tmp_path / "three", **common))
    assert losses(tmp_path / "none") == losses(tmp_path / "three")


def test_mae_needs_no_cache_and_sees_the_same_views(make_cache: Make, image_tree: Path, tmp_path: Path) -> None:
    data = {"path": str(image_tree), "workers": 0}
    mae = {"mimic": {"objective": "mae"}, "mask": {"focus": "random"}, "data": data}
    pretrain.run(pretrain_config(tmp_path / "plain", views={"count": 2, "image_size": 64}, **mae))
    pretrain.run(pretrain_config(tmp_path / "cached", cache={"path": make_cache()}, **mae))
    assert losses(tmp_path / "plain") == losses(tmp_path / "cached")


def test_masks_per_sample_trains_each_image_so_often(cache: Path, image_tree: Path, tmp_path: Path) -> None:
    config = pretrain_config(
        tmp_path / "run", mask={"masks_per_sample": 2, "focus": "random"}, epochs=1, max_steps=None,
        **inputs(cache, image_tree),
    )  # fmt: skip
    pretrain.run(config)
    assert rows(tmp_path / "run")[-1]["step"] == 6  # 24 images, 4 of them in a batch of 8 masks


def test_gradient_checkpointing_changes_nothing_but_memory(make_cache: Make, image_tree: Path, tmp_path: Path) -> None:
    common = inputs(make_cache(), image_tree)
    pretrain.run(pretrain_config(tmp_path / "plain", **common))
    pretrain.run(pretrain_config(tmp_path / "saving", **common, student={**MICRO, "gradient_checkpointing": True}))
    assert dict(losses(tmp_path / "saving")) == pytest.approx(dict(losses(tmp_path / "plain")), rel=1e-6)


def test_two_teachers(make_cache: Make, image_tree: Path, tmp_path: Path) -> None:
    first = make_cache("first")
    second = make_cache("second", teacher__tokens="block", teacher__layers=2)
    config = pretrain_config(
        tmp_path / "run",
        data={"path": str(image_tree), "workers": 0},
        caches={"a": {"path": str(first)}, "b": {"path": str(second)}},
    )
    pretrain.run(config)
    assert {"mimic_loss/a", "mimic_loss/b"} <= set(rows(tmp_path / "run")[-1])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cache": None}, ConfigError, r"needs a cache: give cache\.path"),
        ({"data": {}}, ConfigError, r"'data\.path' is missing"),
        ({"student": {**MICRO, "image_size": 32}}, ConfigError, r"set student\.image_size=64"),
        ({"student": {**MICRO, "patch_size": 8}}, CacheError, r"4x4 grid, the student's is 8x8.*resize_targets=bil"),
        ({"batch_size": 25}, TrainingError, r"lower batch_size"),
        ({"batch_size": 6, "accum_iter": 4}, TrainingError, r"no multiple of 4"),
        ({"init": "/nowhere"}, CheckpointError, r"/nowhere does not exist"),
        ({"data": {"limit": 8}, "cache": "webdataset"}, ConfigError, r"data\.limit chooses among .* leave it out"),
    ],
)
def test_what_does_not_fit_gets_a_clear_line(
    make_cache: Make, image_tree: Path, tmp_path: Path, changes: dict[str, Any], error: type, message: str
) -> None:
    keys = {**inputs(make_cache(), image_tree), **changes}
    if changes.get("cache") == "webdataset":
        keys["cache"] = {"path": str(make_cache("stored", cache__store="webdataset"))}
    with pytest.raises(error, match=message):
        pretrain.run(pretrain_config(tmp_path / "run", **keys))


def test_a_cache_of_other_images_is_refused(make_cache: Make, image_tree: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for number, file in enumerate(sorted(image_tree.rglob("*.jpg"))[:16]):
        (other / f"{number}.jpg").write_bytes(file.read_bytes())
    with pytest.raises(CacheError, match="was made of 24 images"):
        pretrain.run(pretrain_config(tmp_path / "run", **inputs(make_cache(), other)))


def test_an_unfinished_cache_is_refused(make_cache: Make, image_tree: Path, tmp_path: Path) -> None:
    path = make_cache()
    max((path / "commits").iterdir()).unlink()
    with pytest.raises(CacheError, match="lacks 1 of 3 shards"):
        pretrain.run(pretrain_config(tmp_path / "run", **inputs(path, image_tree)))


def test_a_changed_image_is_caught_at_the_sample(make_cache: Make, image_tree: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    for file in image_tree.rglob("*.jpg"):
        target = images / file.relative_to(image_tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    path = make_cache(images=images)
    changed = bytearray((images / "class1/10.jpg").read_bytes())
    changed[-20] ^= 1
    (images / "class1/10.jpg").write_bytes(changed)
    with pytest.raises(CacheError, match=r"class1/10\.jpg is not the one that the cache was made of"):
        pretrain.run(
            pretrain_config(tmp_path / "run", epochs=2, max_steps=None, check_records=0, **inputs(path, images))
        )
    with pytest.raises(CacheError, match=r"class1/10\.jpg is not the one that cache test_vit was made of"):
        pretrain.run(pretrain_config(tmp_path / "run", check_records=200, **inputs(path, images)))


def test_another_run_in_the_output_is_not_overwritten(make_cache: Make, image_tree: Path, tmp_path: Path) -> None:
    common = inputs(make_cache(), image_tree)
    pretrain.run(pretrain_config(tmp_path / "run", **common))
    with pytest.raises(CheckpointError, match=r"holds a run with seed=0, this one has seed=1"):
        pretrain.run(pretrain_config(tmp_path / "run", seed=1, **common))
    with pytest.raises(ConfigError, match=r"holds a run already"):
        pretrain.run(pretrain_config(tmp_path / "run", resume="never", **common))


def test_teachers_in_another_order_are_another_run(make_cache: Make, image_tree: Path, tmp_path: Path) -> None:
    """The first one's attention chooses the patches, and the optimiser knows its parameters by their order."""
    paths = {name: {"path": str(make_cache(name, views__count=1))} for name in ("a", "b")}
    data = {"path": str(image_tree), "workers": 0}
    pretrain.run(pretrain_config(tmp_path / "run", data=data, caches=paths, max_steps=2))
    turned = {name: paths[name] for name in ("b", "a")}
    with pytest.raises(CheckpointError, match=r"with teachers_in_order=\['a', 'b'\], this one has .*\['b', 'a'\]"):
        pretrain.run(pretrain_config(tmp_path / "run", data=data, caches=turned, max_steps=4))


def test_another_init_is_another_run(make_cache: Make, image_tree: Path, tmp_path: Path) -> None:
    common = {**inputs(make_cache(), image_tree), "max_steps": 1}
    for seed in (1, 2):
        pretrain.run(pretrain_config(tmp_path / str(seed), seed=seed, **common))
    pretrain.run(pretrain_config(tmp_path / "run", init=str(tmp_path / "1"), **common))
    for other in ({"init": str(tmp_path / "2")}, {}):
        with pytest.raises(CheckpointError, match="holds a run with init="):
            pretrain.run(pretrain_config(tmp_path / "run", **other, **common))
    with pytest.raises(CheckpointError, match="holds a run with init=None"):
        pretrain.run(pretrain_config(tmp_path / "1", seed=1, init=str(tmp_path / "2"), **common))


def test_a_repair_between_stop_and_resume_is_said(
    make_cache: Make, image_tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common = inputs(make_cache(), image_tree)
    live = knowledge.live_samples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knowledge, "live_samples", lambda caches: live(caches)[:-1])
        pretrain.run(pretrain_config(tmp_path / "run", **{**common, "max_steps": 2}))
    with caplog.at_level("WARNING"):
        pretrain.run(pretrain_config(tmp_path / "run", **common))
    assert re.search(r"samples was 23 \(\w+\) when the run stopped and is 24 \(\w+\) now", caplog.text)


def test_the_same_mask_is_not_trained_several_times() -> None:
    with pytest.raises(ValueError, match="top-k knows one mask a sample"):
        MaskConfig(focus="top-k", masks_per_sample=2)


def test_a_non_finite_loss_stops_with_step_rate_and_checkpoint(
    make_cache: Make, image_tree: Path, tmp_path: Path
) -> None:
    common = inputs(make_cache(), image_tree)
    config = pretrain_config(
        tmp_path / "run", optim={"lr": 1e30, "warmup_epochs": 0, "weight_decay": 0.0}, checkpoint_every=1, **common
    )
    good = f"{tmp_path}/run/checkpoints/step-00000001"
    with pytest.raises(
        TrainingError, match=rf"non-finite at step 1 \(lr .*\); last checkpoint: {good}; lower optim.blr"
    ):
        pretrain.run(config)
    assert load_checkpoint(Path(good)).step == 1


def test_tombstones_are_passed_over(make_cache: Make, image_tree: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number, file in enumerate(sorted(image_tree.rglob("*.jpg"))):
        (images / f"{number:02d}.jpg").write_bytes(file.read_bytes() if number != 5 else b"no image")
    path = make_cache(images=images, max_tombstones=0.1)
    assert len(open_cache(path).live_indices()) == 23
    pretrain.run(pretrain_config(tmp_path / "run", epochs=2, max_steps=None, **inputs(path, images)))
    assert rows(tmp_path / "run")[-1]["step"] == 4  # 23 live images: two whole batches of 8 an epoch


def test_attention_per_head_focuses_by_its_mean(make_cache: Make, image_tree: Path, tmp_path: Path) -> None:
    """One mask a sample, whatever the number of heads."""
    common = {"epochs": 1, "max_steps": None}
    pretrain.run(
        pretrain_config(tmp_path / "run", **common, **inputs(make_cache("heads", cache__attention="heads"), image_tree))
    )
    assert rows(tmp_path / "run")[-1]["step"] == 3  # 24 images in batches of 8
    reader = open_cache(tmp_path / "heads")
    assert reader.read(0, 0).attention.shape == (2, 16)


def test_caches_of_other_pixels_do_not_mix(make_cache: Make, image_tree: Path, tmp_path: Path) -> None:
    caches = {name: {"path": str(make_cache(name, cache__store=name))} for name in ("zarr", "webdataset")}
    data = {"path": str(image_tree), "workers": 0}
    with pytest.raises(CacheError, match="differ in preprocessing"):
        pretrain.run(pretrain_config(tmp_path / "run", data=data, caches=caches))


def test_a_finished_longer_run_is_not_taken_for_a_shorter_one(
    make_cache: Make, image_tree: Path, tmp_path: Path
) -> None:
    common = inputs(make_cache(), image_tree)
    pretrain.run(pretrain_config(tmp_path / "run", **common))
    with pytest.raises(TrainingError, match="holds a run of 6 steps, this one would have 2"):
        pretrain.run(pretrain_config(tmp_path / "run", **{**common, "max_steps": 2}))
    with pytest.raises(CheckpointError, match="with mask="):
        pretrain.run(pretrain_config(tmp_path / "run", mask={"mask_ratio": 0.5}, **common))


def test_the_records_are_held_against_the_live_images_before_the_first_step(
    cache: Path, image_tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="stages"):
        pretrain.run(pretrain_config(tmp_path / "run", max_steps=1, **inputs(cache, image_tree)))
    against = "their stored images" if cache.name == "webdataset" else r"the live images (hash, box and flip)"
    assert f"checked 32 random records of test_vit: checksums, and {against}" in caplog.text


def test_views_that_another_policy_drew_are_refused(
    make_cache: Make, image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_cache()
    draw = caches.draw_view
    monkeypatch.setattr(caches, "draw_view", lambda *to: draw(to[0].model_copy(update={"seed": 1}), *to[1:]))
    with pytest.raises(CacheError, match="its policy draws"):
        pretrain.run(pretrain_config(tmp_path / "run", **inputs(path, image_tree)))


@pytest.mark.parametrize("focus", ["sampled", "top-k", "random"])
@pytest.mark.parametrize(("quantiser", "tolerance"), [("float32", 1e-5), ("int8", 1e-2), ("int4", 5e-2)])
def test_cached_equals_online(
    make_cache: Make, image_tree: Path, tmp_path: Path, quantiser: str, tolerance: float, focus: str
) -> None:
    """The same views and masks, so the same losses: what a cache changes is the price of a step."""
    masks = 1 if focus == "top-k" else 2
    common: dict[str, Any] = {
        "data": {"path": str(image_tree), "workers": 0}, "epochs": 3, "max_steps": None,
        "mask": {"focus": focus, "masks_per_sample": masks},
    }  # fmt: skip
    path = make_cache(cache__quantiser=quantiser)
    pretrain.run(pretrain_config(tmp_path / "cached", cache={"path": str(path)}, **common))
    views = {"count": 2, "image_size": 64}
    pretrain.run(pretrain_config(tmp_path / "online", teacher=TEACHER, views=views, **common))
    assert len(losses(tmp_path / "cached")) == 9 * masks
    assert dict(losses(tmp_path / "online")) == pytest.approx(dict(losses(tmp_path / "cached")), rel=tolerance)


@pytest.mark.parametrize("objective", ["feature_decoder", "joint_decoder"])
def test_cached_equals_online_for_masked_rows_and_channel_statistics(
    make_cache: Make, image_tree: Path, tmp_path: Path, objective: str
) -> None:
    common = {
        "data": {"path": str(image_tree), "workers": 0},
        "mimic": {"objective": objective, "target_norm": "channel"},
    }
    pretrain.run(pretrain_config(tmp_path / "cached", cache={"path": str(make_cache())}, **common))
    views = {"count": 2, "image_size": 64}
    pretrain.run(pretrain_config(tmp_path / "online", teacher=TEACHER, views=views, **common))
    assert dict(losses(tmp_path / "online")) == pytest.approx(dict(losses(tmp_path / "cached")), rel=1e-2)


@pytest.mark.parametrize(
    ("objective", "focus", "masks"),
    [
        ("mr_mae", "sampled", 4),
        ("mr_mae", "top-k", 1),
        ("mr_mae", "random", 4),
        ("joint_decoder", "sampled", 2),
        ("feature_encoder", "sampled", 1),
    ],
)
def test_cached_equals_online_where_a_share_is_predicted(
    make_cache: Make, image_tree: Path, tmp_path: Path, objective: str, focus: str, masks: int
) -> None:
    common: dict[str, Any] = {
        "data": {"path": str(image_tree), "workers": 0}, "student": CROSS, "mimic": {"objective": objective},
        "mask": {"focus": focus, "masks_per_sample": masks},
    }  # fmt: skip
    pretrain.run(
        pretrain_config(tmp_path / "cached", cache={"path": str(make_cache(cache__quantiser="float32"))}, **common)
    )
    views = {"count": 2, "image_size": 64}
    pretrain.run(pretrain_config(tmp_path / "online", teacher=TEACHER, views=views, **common))
    assert dict(losses(tmp_path / "online")) == pytest.approx(dict(losses(tmp_path / "cached")), rel=1e-5)


def test_two_live_teachers(image_tree: Path, tmp_path: Path) -> None:
    data = {"path": str(image_tree), "workers": 0}
    teachers = {"a": TEACHER, "b": {**TEACHER, "tokens": "block"}}
    common = {"data": data, "views": {"image_size": 64}}
    pretrain.run(pretrain_config(tmp_path / "run", teachers=teachers, **common))
    assert {"mimic_loss/a", "mimic_loss/b"} <= set(rows(tmp_path / "run")[-1])
    with pytest.raises(CheckpointError, match="holds a run with teachers="):
        pretrain.run(pretrain_config(tmp_path / "run", teachers={"a": TEACHER, "b": TEACHER}, **common))
    with pytest.raises(ValueError, match=r"give one of cache\.path"):
        pretrain_config(tmp_path / "run", teachers=teachers, teacher=TEACHER, **common)


def test_a_teacher_without_attention_wants_a_random_focus(make_cache: Make, image_tree: Path, tmp_path: Path) -> None:
    """A ViT that pools by the mean, cached and live."""
    blind = {"spec": "timm:test_vit4", "weights": "random", "image_size": 64}
    data = {"path": str(image_tree), "workers": 0}
    path = make_cache("blind", teacher=blind)
    assert open_cache(path).header.attention == "none"
    ways = {"cached": {"cache": {"path": str(path)}}, "live": {"teacher": blind, "views": {"image_size": 64}}}
    for name, way in ways.items():
        with pytest.raises(ConfigError, match="no attention to focus by"):
            pretrain.run(pretrain_config(tmp_path / name, data=data, **way))
        focus = {"mask": {"focus": "random"}, "max_steps": 2}
        pretrain.run(pretrain_config(tmp_path / name, data=data, **way, **focus))
        assert "mimic_loss" in rows(tmp_path / name)[-1]


def test_the_first_cache_with_attention_is_the_focus(
    make_cache: Make, image_tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blind = {"spec": "timm:test_vit4", "weights": "random", "image_size": 64}
    paths = {"blind": make_cache("blind", teacher=blind), "seeing": make_cache("seeing")}
    masks = MaskSampler(patches=16, keep=4, focus="sampled", seed=0)
    requests = [(epoch, index) for epoch in range(2) for index in range(0, 24, 5)]

    def ids_keep(knows: CachedKnowledge | LiveKnowledge) -> torch.Tensor:
        dataset = knows.dataset(masks, "visible")
        return knows.targets(dataset)(dataset.__getitems__(requests))[0]

    both = knowledge.open_cached(paths, str(image_tree), None)
    alone = knowledge.open_cached({"seeing": paths["seeing"]}, str(image_tree), None)
    assert both.attended == alone.attended == "seeing"
    assert torch.equal(ids_keep(both), ids_keep(alone))

    teachers = {"blind": build_teacher(**blind), "seeing": build_teacher(**TEACHER)}
    views = ViewConfig(image_size=64, count=2)
    live = knowledge.open_live(teachers, str(image_tree), None, views)
    live_alone = knowledge.open_live({"seeing": teachers["seeing"]}, str(image_tree), None, views)
    assert live.attended == live_alone.attended == "seeing"
    assert torch.equal(ids_keep(live), ids_keep(live_alone))

    caches = {name: {"path": str(path)} for name, path in paths.items()}
    data = {"path": str(image_tree), "workers": 0}
    with caplog.at_level("INFO"):
        pretrain.run(pretrain_config(tmp_path / "run", data=data, caches=caches, max_steps=2))
    assert "masks are drawn by the attention of seeing" in caplog.text


def test_neighbours_are_watched_and_the_best_checkpoint_kept(
    make_cache: Make, image_tree: Path, tmp_path: Path
) -> None:
    labelled = {"path": str(image_tree), "workers": 0}
    config = pretrain_config(
        tmp_path / "run", knn={"data": labelled, "val": labelled, "every": 1, "k": 3, "crop": 1.0}, log_every=100,
        epochs=3, max_steps=None, **inputs(make_cache(), image_tree),
    )  # fmt: skip
    facts = pretrain.run(config)
    watched = [row for row in rows(tmp_path / "run") if "knn_top1" in row]
    assert [row["step"] for row in watched] == [3, 6, 9]
    assert facts["knn_top1"] == watched[-1]["knn_top1"]
    start = json.loads((tmp_path / "run/starts.jsonl").read_text())
    assert start["evaluated_images"] == sum(1 for _ in image_tree.glob("*/*"))
    best = json.loads((tmp_path / "run/checkpoints/best/checkpoint.json").read_text())
    assert best["metrics"]["knn_top1"] == max(row["knn_top1"] for row in watched)
    asked = {"data": labelled, "val": labelled, "student": MICRO, "crop": 1.0, "k": 3}
    init = {"init": str(tmp_path / "run/checkpoints/step-00000009")}
    alone = knn.run(knn.KnnConfig.model_validate({**asked, **init, "student": None}))
    assert alone["top1"] == watched[-1]["knn_top1"]


def test_each_losss_pull_is_measured_and_changes_nothing(make_cache: Make, image_tree: Path, tmp_path: Path) -> None:
    common = {**inputs(make_cache(), image_tree), "mimic": {"drop_teachers": True}}
    pretrain.run(pretrain_config(tmp_path / "measured", grad_norms_every=2, accum_iter=2, **common))
    pretrain.run(pretrain_config(tmp_path / "plain", grad_norms_every=0, accum_iter=2, **common))
    assert losses(tmp_path / "measured") == losses(tmp_path / "plain")
    measured = [row["step"] for row in rows(tmp_path / "measured") if row.get("grad_norm/mimic_loss", 0) > 0]
    assert measured == [1, 3, 5]
    assert all(row["grad_norm/pixel_loss"] > 0 for row in rows(tmp_path / "measured") if row["step"] in measured)
    assert not any("grad_norm/mimic_loss" in row for row in rows(tmp_path / "plain"))


def test_weights_that_are_not_finite_never_become_the_best(make_cache: Make, image_tree: Path, tmp_path: Path) -> None:
    labelled = {"path": str(image_tree), "workers": 0}
    config = pretrain_config(
        tmp_path / "run", knn={"data": labelled, "val": labelled, "every": 1}, log_every=100, epochs=3, max_steps=None,
        optim={"lr": 1e30, "warmup_epochs": 0}, grad_norms_every=0, **inputs(make_cache(), image_tree),
    )  # fmt: skip
    with pytest.raises(TrainingError, match="non-finite"):
        pretrain.run(config)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_unlabelled_images_to_watch_are_refused_before_the_first_step(
    make_cache: Make, image_tree: Path, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, file in enumerate(sorted(image_tree.rglob("*.jpg"))[:4]):
        (flat / f"{number}.jpg").write_bytes(file.read_bytes())
    knn_of = {"data": {"path": str(flat)}, "val": {"path": str(flat)}}
    with pytest.raises(DataError, match="has no class"):
        pretrain.run(pretrain_config(tmp_path / "run", knn=knn_of, **inputs(make_cache(), image_tree)))
    assert not (tmp_path / "run/metrics.jsonl").exists()
