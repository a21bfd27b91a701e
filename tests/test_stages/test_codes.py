"""Clusters of a teacher's tokens, from extraction through the cache to the student's cross-entropy."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import cli
import stages.codes
from pipeline.assembly import extraction
from pipeline.assembly.teachers import load_teacher
from pipeline.cache import open_cache, read_commit
from pipeline.configs.teachers import TeacherConfig
from pipeline.data.decoding import decode
from pipeline.data.images import open_images
from pipeline.data.views import View, render, to_chw
from pipeline.errors import CacheError, ConfigError, TeacherError
from pipeline.models import load_model
from stages import cache_info, export, extract_teacher_features, pretrain
from stages.configs.codes import CodesConfig
from tests.test_stages.conftest import TEACHER, extract_config, pretrain_config
from tests.test_stages.test_extract_teacher_features import content
from tests.test_stages.test_pretrain import killed_and_resumed, losses, rows, weights
from tests.test_stages.test_summary import verify

Make = Callable[..., Path]
CODES = {"cache__quantiser": "codes", "cache__clusters": 16}
TARGET = {"target": "codes"}


@pytest.fixture(scope="module")
def codes(image_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of `image_tree` with a codebook of 16."""
    path = tmp_path_factory.mktemp("codes") / "cache"
    extract_teacher_features.run(extract_config(image_tree, path, **CODES))
    return path


def keys_of(cache: Path, images: Path, **mimic: Any) -> dict[str, Any]:
    data = {"path": str(images), "workers": 0}
    return {"cache": {"path": cache}, "data": data, "mimic": TARGET | mimic}


@pytest.mark.parametrize("quantiser", ["int8", "int4", "float16", "float32"])
def test_tokens_are_dequantised_together_as_one_by_one(extracted: Make, quantiser: str) -> None:
    """Stored numbers go to the device, and become tokens there."""
    source = open_cache(extracted(cache__quantiser=quantiser))
    places = [(index, view) for index in range(5) for view in range(2)]
    tokens = stages.codes._tokens(source, [source.read(*place) for place in places])
    expected = [source.read(*place, dequantise=True).tokens for place in places]
    assert torch.equal(tokens, torch.from_numpy(np.stack(expected)))


def test_a_cache_holds_the_clusters_of_what_the_teacher_says(codes: Path, image_tree: Path) -> None:
    """What a live teacher with the codebook would say."""
    reader = open_cache(codes)
    quantiser = reader.header.quantiser
    assert quantiser.clusters == 16
    teacher, images = (
        load_teacher(TeacherConfig.model_validate(TEACHER), torch.device("cpu")),
        open_images(str(image_tree)),
    )
    for index in range(0, 24, 5):
        record = reader.read(index, 1)
        image = render(decode(images.read(index)), View(tuple(record.box.tolist()), record.hflip), 64)
        said, _ = quantiser.quantise(teacher(to_chw(np.asarray(image)[None].copy())).tokens)
        np.testing.assert_array_equal(record.tokens, said[0].numpy())
    used = {int(code) for index in range(24) for code in reader.read(index, 0).tokens.flat}
    assert len(used) > 12
    figures = read_commit(codes, reader.header, 0).fidelity
    assert 0.02 < figures["nmse_mean"] < 1
    assert cache_info.run(cache_info.CacheInfoConfig(path=codes))["quantiser"] == "codes"


def test_a_codebook_takes_more_images_than_channel_statistics(make_cache: Make) -> None:
    """50 tokens a cluster are 50 images of 16 tokens, and there are 24."""
    path = make_cache(**CODES, cache__calibration=1)
    assert open_cache(path).header.quantiser_state["calibration"] == 50


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_it_is_verified_repaired_and_gone_on_with(
    make_cache: Make, image_tree: Path, tmp_path: Path, store: str
) -> None:
    path = make_cache(**CODES, cache__store=store, cache__attention="none")
    assert open_cache(path).header.attention == "none"
    assert verify(path, level="deep", samples=6).sound
    before = content(path)
    file = path / ("tokens/c.1.0.0.0" if store == "zarr" else "shards/000001-00.tar")
    damaged = bytearray(file.read_bytes())
    damaged[-10 if store == "zarr" else 5000] ^= 1
    file.write_bytes(damaged)
    assert not verify(path).sound
    assert verify(path, repair=True).sound
    (path / "commits/000002.json").unlink()
    wanted = {**CODES, "cache__store": store, "cache__attention": "none"}
    assert extract_teacher_features.run(extract_config(image_tree, path, **wanted))["images"] == 8
    assert content(path) == before
    with pytest.raises(CacheError, match=r"quantiser\.clusters is 16 there, 17 here"):
        extract_teacher_features.run(extract_config(image_tree, path, **wanted | {"cache__clusters": 17}))


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_codes_of_a_cache_of_tokens_are_those_of_the_teacher(
    make_cache: Make, image_tree: Path, tmp_path: Path, store: str
) -> None:
    """To the byte, where the cache of tokens has lost nothing; also for an unreadable image, and after a stop."""
    shutil.copytree(image_tree, tmp_path / "images")
    (tmp_path / "images/class1/01.jpg").write_bytes(b"torn")
    keys: dict[str, Any] = {
        "views__count": 1,
        "cache__store": store,
        "images": tmp_path / "images",
        "max_tombstones": 0.1,
    }
    tokens = make_cache("tokens", **keys, cache__quantiser="float32")
    expected = make_cache("expected", **keys, **CODES)
    config = CodesConfig.model_validate({"cache": {"path": tokens}, "output": tmp_path / "codes", "clusters": 16})
    assert stages.codes.run(config)["shards"] == 3
    (tmp_path / "codes/commits/000001.json").unlink()
    assert stages.codes.run(config)["shards"] == 1
    found, wanted = ({name: data for name, data in content(path).items() if not name.startswith("commits")}
                     for path in (tmp_path / "codes", expected))  # fmt: skip
    assert found == wanted
    for shard in range(3):
        commits = [read_commit(path, open_cache(path).header, shard) for path in (tmp_path / "codes", expected)]
        assert commits[0].files == commits[1].files
        assert commits[0].tombstones == commits[1].tombstones
        assert commits[0].fidelity == pytest.approx(commits[1].fidelity)
    assert verify(tmp_path / "codes").sound
    with pytest.raises(CacheError, match=r"quantiser\.clusters is 16 there, 8 here"):
        stages.codes.run(config.model_copy(update={"clusters": 8}))


def test_codes_of_a_cache_leave_the_class_token_out(make_cache: Make, tmp_path: Path) -> None:
    path = make_cache(cache__summary=True, cache__attention="heads")
    done = CliRunner().invoke(cli.main, ["codes", f"cache={path}", f"output={tmp_path / 'codes'}", "clusters=16"])
    assert done.exit_code == 0, done.output
    reader, tokens = open_cache(tmp_path / "codes"), open_cache(path)
    assert reader.header.summary is None
    for index, view in ((0, 1), (17, 0)):
        record, source = reader.read(index, view), tokens.read(index, view, dequantise=True)
        expected, _ = reader.header.quantiser.quantise(torch.from_numpy(source.tokens))
        np.testing.assert_array_equal(record.tokens, expected.numpy())
        np.testing.assert_array_equal(record.attention, source.attention)  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", ["mr_mae", "feature_decoder"])
def test_a_student_learns_the_clusters_of_its_cells(
    codes: Path, image_tree: Path, tmp_path: Path, objective: str
) -> None:
    """The loss begins near that of a guess, and falls, with and without workers."""
    data = {"path": str(image_tree), "workers": 2 if objective == "mr_mae" else 0}
    keys = keys_of(codes, image_tree, objective=objective) | {"data": data, "mask": {"masks_per_sample": 2}}
    pretrain.run(pretrain_config(tmp_path / "run", max_steps=25, epochs=40, **keys))
    first, last = (rows(tmp_path / "run")[at]["mimic_loss"] for at in (0, -1))
    assert first == pytest.approx(math.log(16), rel=0.25)
    assert last < 0.9 * first


def test_targets_are_the_ids_of_the_visible_cells(codes: Path, image_tree: Path, tmp_path: Path) -> None:
    reader, compared = open_cache(codes), []

    class Watching(pretrain._Losses):
        def __call__(self, student: Any, batch: Any) -> Any:
            shown = self._targets(batch)
            for row, index in enumerate(batch.indices.tolist()):
                views = [reader.read(index, view).tokens[:, 0][shown.ids_keep[row].numpy()] for view in (0, 1)]
                compared.append(any(np.array_equal(shown.targets["test_vit"][row], view) for view in views))
            return super().__call__(student, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "_Losses", Watching)
        keys = keys_of(codes, image_tree) | {"grad_norms_every": 0}
        pretrain.run(pretrain_config(tmp_path / "run", max_steps=2, **keys))
    assert compared == 16 * [True]


def test_a_resumed_run_goes_on_bit_for_bit_and_its_student_is_drawn_and_exported(
    codes: Path, image_tree: Path, tmp_path: Path
) -> None:
    common = keys_of(codes, image_tree) | {"grad_norms_every": 2, "checkpoint_every": 2}
    pretrain.run(pretrain_config(tmp_path / "whole", **common))
    resumed = killed_and_resumed(tmp_path / "killed", 3, **common)
    assert resumed.trained == [2, 3, 4, 5]
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert whole["mimic.test_vit.heads.0.weight"].shape == (16, 48)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    model = load_model(tmp_path / "whole/checkpoints/step-00000006")
    assert model.spec["target"] == "codes"
    exported = export.run(export.ExportConfig(init=tmp_path / "whole", output=tmp_path / "timm"))
    assert exported["cosine"] > 0.99999
    command = ["visualize", f"cache.path={codes}", f"data.path={image_tree}", f"init={tmp_path / 'whole'}",
               f"output={tmp_path / 'pictures'}", "count=2"]  # fmt: skip
    done = CliRunner().invoke(cli.main, command)
    assert done.exit_code == 0, done.output


def test_centroids_are_tokens_to_a_student_that_mimics_tokens(codes: Path, image_tree: Path, tmp_path: Path) -> None:
    keys = keys_of(codes, image_tree) | {"mimic": {"target_norm": "channel", "target_scale": 1.0}}
    pretrain.run(pretrain_config(tmp_path / "run", max_steps=2, **keys))
    assert 0 < rows(tmp_path / "run")[0]["mimic_loss"] < 2


def test_two_teachers_of_which_one_has_another_grid(
    make_cache: Make, codes: Path, image_tree: Path, tmp_path: Path
) -> None:
    """The centroids of the second are resized, and their nearest centroids are its targets."""
    wide = make_cache("wide", teacher={**TEACHER, "image_size": 128}, **CODES)
    keys = keys_of(codes, image_tree, resize_targets="bilinear")
    keys |= {"cache": None, "caches": {"a": {"path": codes}, "b": {"path": wide}}}
    pretrain.run(pretrain_config(tmp_path / "run", max_steps=3, **keys))
    first = rows(tmp_path / "run")[0]
    assert first["mimic_loss/b"] == pytest.approx(math.log(16), rel=0.3)
    assert first["mimic_loss"] == pytest.approx((first["mimic_loss/a"] + first["mimic_loss/b"]) / 2, rel=1e-5)


def test_what_codes_cannot_be_combined_with_is_one_line(
    make_cache: Make, codes: Path, image_tree: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    plain = keys_of(make_cache("plain"), image_tree)
    live = {"data": plain["data"], "teacher": TEACHER, "mimic": TARGET, "views": {"image_size": 64}}
    for keys, error, message in (
        (plain, CacheError, "cache test_vit holds int8 tokens, and mimic.target=codes needs codes: extract into a new"),
        (live, ConfigError, "mimic.target=codes needs a cache of codes: give cache.path=..., extracted with"),
        (
            keys_of(codes, image_tree, mimic_loss="cosine"),
            ConfigError,
            "target=codes is learned by cross-entropy: leave",
        ),
    ):
        with pytest.raises(error, match=message) as refused:
            pretrain.run(pretrain_config(run, **keys))
        assert len(str(refused.value).splitlines()) == 1
    with pytest.raises((CacheError, ConfigError), match="class token"):
        pretrain.run(pretrain_config(run, **keys_of(codes, image_tree, summary_weight=1.0)))
    with pytest.raises(ValueError, match="quantiser=codes keeps no class token: set summary=false, or use int8"):
        extract_config(image_tree, tmp_path / "c", **CODES, cache__summary=True)
    with pytest.raises(CacheError, match="384 tokens are too few for 4096 clusters"):
        make_cache("many", cache__quantiser="codes")
    assert not run.exists()
    assert not (tmp_path / "many").exists()


def test_a_teacher_that_says_no_number_is_told(
    image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster always fits into 16 bits: without a look at the tokens, garbage would get one."""
    run_teachers = extraction.run_teachers

    def later(*given: Any) -> Any:
        outputs = run_teachers(*given)
        if (tmp_path / "c/cache.json").exists():  # calibrated
            outputs[0].tokens[1, 2, 3] = math.nan
        return outputs

    monkeypatch.setattr(extraction, "run_teachers", later)
    with pytest.raises(TeacherError, match=r"gave tokens near .* that are not finite"):
        extract_teacher_features.run(extract_config(image_tree, tmp_path / "c", **CODES))
