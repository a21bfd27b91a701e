"""Top-k accuracy."""

import pytest
import torch

from pipeline.evaluation import topk_accuracy


def test_counts_labels_among_the_highest() -> None:
    logits = torch.arange(7.0).expand(5, 7)  # class 6 is the likeliest
    assert topk_accuracy(logits, torch.tensor([6, 5, 2, 1, 0])) == pytest.approx({"top1": 1 / 5, "top5": 3 / 5})


def test_fewer_than_five_classes_all_count() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 3.0, 2.0, 1.0], [1.0, 0.0, 3.0, 2.0]])
    assert topk_accuracy(logits, torch.tensor([3, 0, 1])) == {"top1": 0.0, "top5": 1.0}


def test_many_samples_are_counted_exactly() -> None:
    """In float32 the mean of this many would be off."""
    labels = torch.zeros(2**24 + 3, dtype=torch.long)
    labels[0] = 1
    logits = torch.tensor([[1.0, 0.0]]).expand(len(labels), 2)
    assert topk_accuracy(logits, labels)["top1"] == (len(labels) - 1) / len(labels)
