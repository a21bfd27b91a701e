"""embed: what it writes is what knn read and what timm makes of the export; three formats; unreadable photos."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from pyarrow import parquet
from safetensors import safe_open
from safetensors.numpy import load_file

from pipeline.configs.data import DataConfig
from pipeline.data.images import ImageSource
from pipeline.data.labelled import LabelledDataset, open_labelled
from pipeline.errors import CheckpointError, ConfigError, DataError, StorageError
from pipeline.pixels import normalise
from stages import embed, export, knn
from stages.embed import EmbedConfig
from tests.test_stages.conftest import MICRO, TEACHER, sets
from tests.test_stages.test_processes import forked_ranks


def features(output: Path, **keys: Any) -> Mapping[str, Any]:
    """What `embed` leaves in a safetensors file: tensors, and the metadata."""
    embed.run(EmbedConfig.model_validate({**keys, "output": str(output)}))
    with safe_open(output, "np") as file:
        return {**load_file(output), **file.metadata()}


def photos(colours: Path) -> dict[str, Any]:
    return {"data": {"path": str(colours / "val"), "workers": 0}}


def test_features_are_those_of_knn_and_of_timm(colours: Path, student_run: Path, tmp_path: Path) -> None:
    init = {"init": str(student_run)}
    knn.run(knn.KnnConfig.model_validate({**sets(colours), **init, "output": str(tmp_path / "knn"), "k": 3}))
    kept = [load_file(file)["features"] for file in (tmp_path / "knn/features").iterdir()]
    val = open_labelled("val.path", DataConfig(path=str(colours / "val")))
    found = features(tmp_path / "a.safetensors", **init, **photos(colours))
    assert json.loads(found["keys"]) == [val.key(index) for index in range(12)]
    np.testing.assert_array_equal(found["labels"], val.labels)
    assert json.loads(found["classes"]) == ["blue", "green", "red"]
    (known,) = [rows for rows in kept if len(rows) == 12]
    np.testing.assert_allclose(found["features"], known, rtol=0, atol=1e-6)

    export.run(export.ExportConfig.model_validate({**init, "output": str(tmp_path / "exported")}))
    twin = timm.create_model(f"local-dir:{tmp_path}/exported", pretrained=True).eval()
    images = normalise(LabelledDataset(val, 64).__getitems__([(0, index) for index in range(12)]).images)
    with torch.inference_mode():
        np.testing.assert_allclose(found["features"], twin(images), rtol=0, atol=1e-5)
    again = features(tmp_path / "b.safetensors", init=str(tmp_path / "exported"), **photos(colours))
    np.testing.assert_array_equal(again["features"], found["features"])


@pytest.mark.parametrize("subject", ["init", "student", "teacher"])
def test_every_token_of_every_subject(colours: Path, student_run: Path, tmp_path: Path, subject: str) -> None:
    value: Any = {"init": str(student_run), "student": MICRO, "teacher": TEACHER}[subject]
    keys = {subject: value, "images": [str(file) for file in sorted((colours / "val/red").iterdir())]}
    mean = features(tmp_path / "mean.safetensors", **keys)
    tokens = features(tmp_path / "tokens.safetensors", **keys, pool="none", eval_batch_size=3)
    assert tokens["features"].shape == (4, 4, 4, mean["features"].shape[1])
    np.testing.assert_allclose(tokens["features"].mean((1, 2)), mean["features"], atol=1e-5)
    assert json.loads(tokens["keys"]) == keys["images"]
    assert "labels" not in tokens


def test_three_formats_hold_the_same(colours: Path, tmp_path: Path) -> None:
    keys = {"student": MICRO, **photos(colours), "pool": "none"}
    first = features(tmp_path / "a.safetensors", **keys)
    for name in ("a.npz", "a.parquet"):
        embed.run(EmbedConfig.model_validate({**keys, "output": str(tmp_path / name)}))
    arrays = np.load(tmp_path / "a.npz")  # allow_pickle is False by default
    table = parquet.read_table(tmp_path / "a.parquet")
    columns = {"features": np.array(table["features"].to_pylist(), np.float32), "labels": table["label"].to_numpy()}
    for content in (arrays, columns):
        np.testing.assert_array_equal(content["features"], first["features"])
        np.testing.assert_array_equal(content["labels"], first["labels"])
    assert arrays["keys"].tolist() == table["key"].to_pylist() == json.loads(first["keys"])
    assert json.loads(str(arrays["facts"])) == {key: first[key] for key in json.loads(str(arrays["facts"]))}
    assert table.schema.metadata[b"pool"] == b"none"


def damaged(colours: Path, root: Path) -> dict[str, Any]:
    """Twelve photos, of which three can't be read."""
    for place, file in enumerate(sorted((colours / "val").glob("*/*.png"))):
        copy = root / file.parent.name / file.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes()[: {0: 0, 5: 50}.get(place)])
    (root / "red/gone.png").symlink_to(root / "nowhere.png")
    return {"data": {"path": str(root), "workers": 0}}


def test_an_unreadable_photo_is_named_and_left_out(
    colours: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = features(tmp_path / "a.safetensors", student=MICRO, **photos(colours))
    keys = damaged(colours, tmp_path / "photos")
    found = features(tmp_path / "b.safetensors", student=MICRO, **keys)
    names = json.loads(whole["keys"])
    kept = [place for place in range(12) if place not in (0, 5)]
    assert json.loads(found["keys"]) == [names[place] for place in kept]
    np.testing.assert_array_equal(found["labels"], whole["labels"][kept])
    np.testing.assert_allclose(found["features"], whole["features"][kept], atol=1e-5)
    assert set(json.loads(found["unreadable"])) == {names[0], names[5], "red/gone.png"}
    assert "3 of 13 images of data.path can't be read (" in caplog.text
    assert "red/gone.png: No such file or directory" in caplog.text

    images = [str(tmp_path / "absent.jpg"), str(colours / "val/red" / Path(names[-1]).name)]
    alone = features(tmp_path / "c.safetensors", student=MICRO, images=images)
    assert json.loads(alone["keys"]) == images[1:]
    with pytest.raises(DataError, match=r"none of 1 images can be read \(.*absent.jpg: No such file or directory\)"):
        features(tmp_path / "d.safetensors", student=MICRO, images=images[:1])


def test_a_disk_that_fails_is_no_unreadable_photo(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> bytes:
        raise StorageError("image a: Input/output error, 4 times: mend the disk or network, then run again")

    monkeypatch.setattr(ImageSource, "read", fail)
    with pytest.raises(StorageError):
        features(tmp_path / "a.safetensors", student=MICRO, **photos(colours))
    assert not list(tmp_path.iterdir())


def test_processes_share_the_images(colours: Path, tmp_path: Path) -> None:
    micro = ", ".join(f"{key}: {value}" for key, value in MICRO.items())
    keys = damaged(colours, tmp_path / "photos")
    words = [f"student={{{micro}}}", f"data={{path: {keys['data']['path']}, workers: 0}}"]
    done = forked_ranks(2, "embed", *words, f"output={tmp_path}/two.safetensors")
    assert [process.returncode for process in done] == [0, 0], done[0].stderr
    assert sum("3 of 13 images" in process.stderr for process in done) == 1
    alone = features(tmp_path / "one.safetensors", student=MICRO, **keys)
    two = load_file(tmp_path / "two.safetensors")
    np.testing.assert_allclose(two["features"], alone["features"], atol=1e-5)
    np.testing.assert_array_equal(two["labels"], alone["labels"])


def test_what_is_refused(colours: Path, student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"student": MICRO, **photos(colours)}
    with pytest.raises(ConfigError, match=r"a.csv: choose a name that ends with .safetensors, .npz, .parquet"):
        features(tmp_path / "a.csv", **keys)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"pip install -e '\.\[parquet\]'"):
            features(tmp_path / "a.parquet", **keys)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.evaluation.embeddings._LARGEST_HEADER", 100)
        with pytest.raises(ConfigError, match=r"safetensors holds no 12 keys: choose \.npz"):
            features(tmp_path / "a.safetensors", **keys)
    with pytest.raises(ValueError, match="give either images"):
        EmbedConfig.model_validate({**keys, "images": ["a.jpg"], "output": "a.npz"})
    with pytest.raises(ValueError, match=r"give one of init and teacher\.spec"):
        EmbedConfig.model_validate({**keys, "init": "a", "teacher": TEACHER, "output": "a.npz"})
    (tmp_path / "old").mkdir()
    for name, content in (("config.json", '{"architecture": "vit_tiny_patch16_224"}'), ("model.safetensors", "")):
        (tmp_path / "old" / name).write_text(content)
    with pytest.raises(CheckpointError, match="doesn't say which student it is of: export it again"):
        features(tmp_path / "a.npz", init=str(tmp_path / "old"), **photos(colours))
    assert [file.name for file in tmp_path.iterdir()] == ["old"]
