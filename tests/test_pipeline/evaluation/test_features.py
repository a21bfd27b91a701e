"""Features of a data set, and the file that keeps them."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.evaluation import FeatureFiles, content_digest, extract_features


def batches() -> list[tuple[Tensor, Tensor]]:
    images = torch.arange(5 * 3 * 4 * 4, dtype=torch.uint8).view(5, 3, 4, 4)
    return [(images[:3], torch.tensor([2, 0, 1])), (images[3:], torch.tensor([1, 1], dtype=torch.int32))]


def test_order_and_types() -> None:
    features, labels = extract_features(lambda x: x.double().flatten(1).mean(1, keepdim=True), batches())
    expected = torch.cat([images for images, _ in batches()]).float().flatten(1).mean(1, keepdim=True)
    torch.testing.assert_close(features, expected)
    assert (features.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert labels.tolist() == [2, 0, 1, 1, 1]


def test_features_can_take_part_in_training() -> None:
    layer = torch.nn.Linear(48, 2)
    features, _ = extract_features(lambda x: layer(x.float().flatten(1)), batches())
    assert not features.requires_grad
    torch.nn.Linear(2, 1)(features).sum().backward()


def test_nothing_to_encode() -> None:
    with pytest.raises(DataError, match="no images"):
        extract_features(lambda x: x, [])


KNOWN = {"subject": "model abc", "data": "def", "size": "64", "crop": "0.875"}


def test_kept_features_come_back_and_others_do_not(tmp_path: Path) -> None:
    files, content = FeatureFiles(tmp_path / "kept", KNOWN), content_digest(torch.arange(5))
    assert not files.any()
    assert files.read(content) is None
    features = torch.randn(5, 3)
    files.write(features, content)
    again = FeatureFiles(tmp_path / "kept", KNOWN)
    assert again.any()
    kept = again.read(content)
    assert kept is not None
    assert torch.equal(kept, features)
    assert again.read(content_digest(torch.tensor([0, 1, 2, 3, 5]))) is None
    for key in KNOWN:
        other = FeatureFiles(tmp_path / "kept", {**KNOWN, key: "other"})
        assert not other.any()
        assert other.read(content) is None
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [files.path(content).name]  # no partial file stays


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "renamed"])
def test_damaged_features_are_computed_again_with_a_warning(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = FeatureFiles(tmp_path, KNOWN)
    files.write(torch.randn(5, 3), "a")
    content = bytearray(files.path("a").read_bytes())
    if how == "renamed":
        files.path("a").rename(files.path("b"))
    else:
        content[-5] ^= 1
        files.path("a").write_bytes({"flip": content, "cut": content[:-7], "empty": b""}[how])
    with caplog.at_level(logging.WARNING):
        assert files.read("b" if how == "renamed" else "a") is None
    assert "computing the features again" in caplog.text
