"""The linear probe: gradients by autograd, LARS by its formula, accuracy by scikit-learn's."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from pipeline.evaluation import FeatureSets, ProbeHeads, linear_probe
from pipeline.evaluation.probe import TRUST, lr_factor


def test_two_steps_are_lars_on_autograds_gradients() -> None:
    """v ← 0.9 v + λ·‖w‖/‖g‖·g, w ← w − lr·v, for weights; plain momentum for biases; written out head by head."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 32, 6, generator=generator) * 3 + 1, torch.randint(0, 4, (2, 32), generator=generator)
    lrs = (0.5, 20.0)
    heads = ProbeHeads(6, 4, lrs)
    start = heads.weight[0].clone()
    losses = [heads.step(x[step], y[step], lr_scale=0.5) for step in range(2)]
    for head, lr in enumerate(lrs):
        w, b = start.clone().requires_grad_(), torch.zeros(4, requires_grad=True)
        vw, vb = torch.zeros(6, 4), torch.zeros(4)
        for step in range(2):
            normed = (x[step] - x[step].mean(0)) / (x[step].var(0, unbiased=False) + 1e-6).sqrt()
            loss = F.cross_entropy(normed @ w + b, y[step])
            torch.testing.assert_close(losses[step][head], loss.detach())
            gw, gb = torch.autograd.grad(loss, (w, b))
            vw = 0.9 * vw + gw * TRUST * w.detach().norm() / gw.norm()
            vb = 0.9 * vb + gb
            w, b = (w.detach() - 0.5 * lr * vw).requires_grad_(), (b.detach() - 0.5 * lr * vb).requires_grad_()
        torch.testing.assert_close(heads.weight[head], w.detach())
        torch.testing.assert_close(heads.bias[head], b.detach())


def test_agrees_with_logistic_regression(digits: FeatureSets) -> None:
    train_x, train_y, test_x, test_y, _ = digits
    mean, std = train_x.mean(0), train_x.std(0).clamp_min(1e-3)
    scores = [
        LogisticRegression(C=strength, max_iter=5000)
        .fit(((train_x - mean) / std).numpy(), train_y.numpy())
        .score(((test_x - mean) / std).numpy(), test_y.numpy())
        for strength in (0.01, 0.1, 1.0)
    ]
    result = linear_probe(digits)
    assert result["top1"] == pytest.approx(max(scores), abs=0.015)  # both are linear: neither may be far ahead
    assert result["top5"] >= 0.99


def test_separable_clusters_are_learnt_whatever_their_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 16, generator=generator) * 4
    y = torch.arange(1000) % 5
    x = (centres[y] + torch.randn(1000, 16, generator=generator)) * torch.logspace(-3, 3, 16) + 100
    result = linear_probe(FeatureSets(x[:800], y[:800], x[800:], y[800:], 5), epochs=30)
    assert result["top1"] == 1.0


def test_every_rate_is_reported_and_alone_gives_the_same(digits: FeatureSets) -> None:
    together = linear_probe(digits, epochs=5, lrs=(1.0, 10.0))
    assert [result["lr"] for result in together["all"]] == [1.0, 10.0]
    assert together["top1"] == max(result["top1"] for result in together["all"])
    for result in together["all"]:
        alone = linear_probe(digits, epochs=5, lrs=(result["lr"],))
        assert alone["top1"] == pytest.approx(result["top1"], abs=2 / 597)


def test_seed_decides(digits: FeatureSets) -> None:
    state = torch.random.get_rng_state()
    first, again = (linear_probe(digits, epochs=2, seed=1) for _ in range(2))
    other = linear_probe(digits, epochs=2, seed=2)
    assert first == again
    assert first["all"] != other["all"]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_sets_smaller_than_a_batch_still_train(digits: FeatureSets) -> None:
    small = digits._replace(train_x=digits.train_x[:100], train_y=digits.train_y[:100])
    result = linear_probe(small, batch_size=4096)
    assert result["top1"] > 0.7


def test_schedule_warms_up_and_falls_to_zero() -> None:
    factors = np.array([lr_factor(epoch, 90) for epoch in (0, 5, 10, 50, 90)])
    np.testing.assert_allclose(factors, [0, 0.5, 1, 0.5, 0], atol=1e-12)
