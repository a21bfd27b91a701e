"""Top-k accuracy."""

import pytest
import torch

from pipeline.evaluation import topk_accuracy

LOGITS = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 3.0, 2.0, 1.0], [1.0, 0.0, 3.0, 2.0]])


def test_counts_labels_among_the_highest() -> None:
    result = topk_accuracy(LOGITS, torch.tensor([0, 2, 1]), ks=(1, 2, 4))
    assert result == pytest.approx({"top1": 1 / 3, "top2": 2 / 3, "top4": 1.0})


def test_k_beyond_the_classes_counts_all_of_them() -> None:
    assert topk_accuracy(LOGITS, torch.tensor([3, 0, 1])) == {"top1": 0.0, "top5": 1.0}


def test_many_samples_are_counted_exactly() -> None:
    """In float32 the mean of this many would be off."""
    labels = torch.zeros(2**24 + 3, dtype=torch.long)
    labels[0] = 1
    logits = torch.tensor([[1.0, 0.0]]).expand(len(labels), 2)
    assert topk_accuracy(logits, labels, ks=(1,))["top1"] == (len(labels) - 1) / len(labels)
