"""Features that classifiers learn from in a second."""

import pytest
import torch
from sklearn.datasets import load_digits

from pipeline.evaluation import FeatureSets


@pytest.fixture(scope="session")
def digits() -> FeatureSets:
    x, y = load_digits(return_X_y=True)
    features, labels = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.long)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    return FeatureSets(features[train], labels[train], features[test], labels[test], 10)
