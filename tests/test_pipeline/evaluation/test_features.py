"""Features of a data set, and the file that keeps them."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.evaluation import FeatureFile, extract_features


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
    file = FeatureFile(tmp_path / "kept", KNOWN)
    assert file.read() is None
    features = torch.randn(5, 3)
    file.write(features)
    again = FeatureFile(tmp_path / "kept", KNOWN).read()
    assert again is not None
    assert torch.equal(again, features)
    for key in KNOWN:
        assert FeatureFile(tmp_path / "kept", {**KNOWN, key: "other"}).read() is None
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [file.path.name]  # no partial file stays


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "renamed"])
def test_damaged_features_are_computed_again_with_a_warning(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = FeatureFile(tmp_path, KNOWN)
    file.write(torch.randn(5, 3))
    content = bytearray(file.path.read_bytes())
    if how == "renamed":
        other = FeatureFile(tmp_path, {**KNOWN, "data": "other"})
        file.path.rename(other.path)
        file = other
    else:
        content[-5] ^= 1
        file.path.write_bytes({"flip": content, "cut": content[:-7], "empty": b""}[how])
    with caplog.at_level(logging.WARNING):
        assert file.read() is None
    assert "computing the features again" in caplog.text
