"""Features of a data set."""

import pytest
import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.evaluation import extract_features


def batches() -> list[tuple[Tensor, Tensor]]:
    images = torch.arange(5 * 3 * 4 * 4, dtype=torch.uint8).view(5, 3, 4, 4)
    return [(images[:3], torch.tensor([2, 0, 1])), (images[3:], torch.tensor([1, 1], dtype=torch.int32))]


def test_order_types_and_progress() -> None:
    told: list[int] = []
    features, labels = extract_features(lambda x: x.double().flatten(1).mean(1, keepdim=True), batches(), told.append)
    whole = torch.cat([images for images, _ in batches()]).float().flatten(1).mean(1, keepdim=True)
    torch.testing.assert_close(features, whole)
    assert (features.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert labels.tolist() == [2, 0, 1, 1, 1]
    assert told == [3, 5]


def test_features_can_take_part_in_training() -> None:
    layer = torch.nn.Linear(48, 2)
    features, _ = extract_features(lambda x: layer(x.float().flatten(1)), batches())
    assert not features.requires_grad
    torch.nn.Linear(2, 1)(features).sum().backward()


def test_nothing_to_encode() -> None:
    with pytest.raises(DataError, match="no images"):
        extract_features(lambda x: x, [])
