"""k-NN against scikit-learn, and where its result mustn't depend on how it is computed."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from pipeline.evaluation import FeatureSets, knn, knn_classify


@pytest.mark.parametrize("k", [1, 10, 20])
@pytest.mark.parametrize("temperature", [0.07, 0.2, None])
def test_agrees_with_scikit_learn(k: int, temperature: float | None, digits: FeatureSets) -> None:
    train_x, train_y, test_x, test_y, _ = digits
    weights = "uniform" if temperature is None else lambda distance: np.exp((1 - distance) / temperature)
    reference = KNeighborsClassifier(k, metric="cosine", weights=weights).fit(train_x.numpy(), train_y.numpy())
    probabilities = reference.predict_proba(test_x.numpy())
    ours = knn_classify(digits, k=k, temperature=temperature)
    assert ours["top1"] == pytest.approx(reference.score(test_x.numpy(), test_y.numpy()), abs=1e-9)
    # Classes without a neighbour all have no vote, so beyond them the order is anyone's.
    ranks = (probabilities > probabilities[np.arange(len(test_y)), test_y.numpy()][:, None]).sum(1)
    present = probabilities[np.arange(len(test_y)), test_y.numpy()] > 0
    assert ours["top5"] >= (present & (ranks < 5)).mean() - 1e-9


def test_chunks_do_not_show(digits: FeatureSets, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = knn_classify(digits)
    monkeypatch.setattr(knn, "TRAIN_CHUNK", 7)
    monkeypatch.setattr(knn, "TEST_CHUNK", 11)
    assert knn_classify(digits) == expected


def test_length_of_features_does_not_show(digits: FeatureSets) -> None:
    scaled = knn_classify(digits._replace(train_x=digits.train_x * 1000, val_x=digits.val_x / 1000))
    assert scaled == knn_classify(digits)


def test_equal_votes_go_to_the_lower_class() -> None:
    train = torch.tensor([[1.0, 0.1], [1.0, -0.1]])
    for labels in ([3, 1], [1, 3]):
        sets = FeatureSets(train, torch.tensor(labels), torch.tensor([[1.0, 0.01]]), torch.tensor([1]), 4)
        result = knn_classify(sets, k=2, temperature=None)
        assert result["top1"] == 1.0


def test_low_temperatures_do_not_overflow(digits: FeatureSets) -> None:
    cold = knn_classify(digits, temperature=1e-3)
    assert cold["top1"] == knn_classify(digits, k=1)["top1"]


def test_fewer_neighbours_than_k_and_classes_unseen() -> None:
    train = torch.eye(3)
    result = knn_classify(FeatureSets(train, torch.tensor([0, 1, 2]), train, torch.tensor([0, 1, 7]), 9), k=20)
    assert result["top1"] == pytest.approx(2 / 3)


def test_autocast_does_not_blur_neighbours_that_lie_close_together() -> None:
    """As in pre-training: features share most of their length, and bf16 knows two digits of a cosine."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 64, generator=generator)

    def sample(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % 10
        return 25 + centres[labels] + 0.7 * torch.randn(count, 64, generator=generator), labels

    sets = FeatureSets(*sample(300), *sample(100), 10)
    exact = knn_classify(sets)
    assert exact["top1"] > 0.9
    with torch.autocast("cpu", torch.bfloat16):
        assert knn_classify(sets) == exact
