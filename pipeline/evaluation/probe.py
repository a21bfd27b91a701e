"""Linear probe: how far one linear layer gets on frozen features.

The recipe is MAE's (arXiv 2111.06377, appendix A.1): an affine-free batch norm before the classifier, LARS without
weight decay, a cosine after warm-up. Several learning rates are trained at once, for the price of little more than one.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.evaluation.features import FeatureSets
from pipeline.evaluation.metrics import topk_accuracy

# LARS (arXiv 1708.03888): a step's length is this share of the weights' norm, times the learning rate.
TRUST, MOMENTUM = 0.001, 0.9


# LARS moves the weights by lr × TRUST × their norm a step, so lr × steps says how far they come. Below 20,000 steps
# these products enclose the best of 60 to 450 images (docs/results.md); above, the rates are MAE's at a batch of 4096.
_PATHS = (500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
_MANY_STEPS, _MAE_LRS = 20_000, (0.32, 0.8, 1.6, 3.2, 8.0)


def fitting_lrs(steps: int) -> tuple[float, ...]:
    """Peak learning rates for a training of so many steps."""
    return _MAE_LRS if steps >= _MANY_STEPS else tuple(path / max(steps, 1) for path in _PATHS)


class ProbeHeads:
    """R linear classifiers on the same features, one a learning rate, trained by LARS side by side.

    Args:
        dim: D, channels of the features.
        num_classes: C.
        lrs: R peak learning rates, already scaled by the batch size.
        seed: of the weights; every head starts from the same ones.
        device: where the heads live and the features are expected.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        lrs: Sequence[float],
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        start = torch.empty(dim, num_classes).normal_(std=0.01, generator=generator)
        self.lrs = torch.tensor(list(lrs), dtype=torch.float32, device=device)  # [R]
        self.weight = start.to(device).expand(len(lrs), -1, -1).clone()  # [R,D,C]
        self.bias = torch.zeros(len(lrs), num_classes, device=device)  # [R,C]
        self._weight_velocity = torch.zeros_like(self.weight)
        self._bias_velocity = torch.zeros_like(self.bias)
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6).to(device)

    @torch.no_grad()
    def step(self, features: Tensor, labels: Tensor, lr_scale: float = 1.0) -> Tensor:
        """One LARS step of every head on a batch; returns their cross-entropies [R] before it.

        The gradient of a linear layer under cross-entropy is written out: xᵀ·(softmax − one-hot) / B.

        Args:
            features: [B,D] float32. labels: [B] int64.
            lr_scale: the schedule's factor on all learning rates.
        """
        x = self.norm.train()(features)
        log_probabilities = self._scores(x).log_softmax(dim=-1)  # [B,R,C]
        target = F.one_hot(labels, self.bias.shape[1])[:, None]  # [B,1,C]
        error = (log_probabilities.exp() - target) / len(x)
        self._update(torch.einsum("bd,brc->rdc", x, error), error.sum(dim=0), self.lrs * lr_scale)
        return -(log_probabilities * target).sum(dim=-1).mean(dim=0)

    @torch.no_grad()
    def accuracies(self, features: Tensor, labels: Tensor, chunk: int = 4096) -> list[dict[str, float]]:
        """Top-1 and top-5 of every head, fractions in 0..1. Features [M,D] may live elsewhere than the heads."""
        device = self.weight.device
        self.norm.eval()
        parts = torch.split(features, chunk)
        scores = torch.cat([self._scores(self.norm(part.to(device, torch.float32))).cpu() for part in parts])
        return [topk_accuracy(scores[:, head], labels.cpu()) for head in range(len(self.lrs))]

    def _scores(self, x: Tensor) -> Tensor:
        """Normed features [B,D] → logits [B,R,C]."""
        return torch.einsum("bd,rdc->brc", x, self.weight) + self.bias

    def _update(self, weight_grad: Tensor, bias_grad: Tensor, lrs: Tensor) -> None:
        """LARS: each head's gradient is scaled by ‖w‖ / ‖gradient‖; biases follow plain momentum."""
        trust = TRUST * self.weight.norm(dim=(1, 2)) / weight_grad.norm(dim=(1, 2)).clamp_min(1e-12)  # [R]
        self._weight_velocity.mul_(MOMENTUM).add_(weight_grad * trust[:, None, None])
        self._bias_velocity.mul_(MOMENTUM).add_(bias_grad)
        self.weight.sub_(lrs[:, None, None] * self._weight_velocity)
        self.bias.sub_(lrs[:, None] * self._bias_velocity)


def linear_probe(
    sets: FeatureSets,
    *,
    epochs: int = 90,
    batch_size: int = 256,
    lrs: Sequence[float] = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
    seed: int = 0,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Train one linear layer for each learning rate on frozen features, and measure them all.

    Args:
        sets: N features to train on, and those to measure.
        epochs: passes over the training features; an incomplete last batch is left out of each.
        batch_size: samples a step, 2 or more (for the norm) and at most N.
        lrs: peak learning rates. MAE's is 0.1 · batch_size / 256 for 1.28 M images; see `fitting_lrs`.
        seed: of the first weights and the order of samples.
        device: where to train; None for where the training features are.

    Returns:
        {"lr", "top1", "top5"} of the best by top-1, and under "all" the same three for every learning rate.
    """
    device = torch.device(device) if device is not None else sets.train_x.device
    x, y = sets.train_x.to(device, torch.float32), sets.train_y.to(device)
    batch_size = min(batch_size, len(x))
    heads = ProbeHeads(x.shape[1], sets.num_classes, lrs, seed=seed, device=device)
    generator = torch.Generator().manual_seed(seed)
    steps = len(x) // batch_size
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=generator).to(device)
        for step in range(steps):
            batch = order[step * batch_size : (step + 1) * batch_size]
            heads.step(x[batch], y[batch], lr_factor(epoch + step / steps, epochs))
    accuracies = heads.accuracies(sets.val_x, sets.val_y)
    results = [{"lr": lr, **accuracy} for lr, accuracy in zip(lrs, accuracies, strict=True)]
    return {**max(results, key=lambda result: result["top1"]), "all": results}


def lr_factor(epoch: float, epochs: int) -> float:
    """Share of the peak learning rate at a (fractional) epoch: a ninth of linear warm-up, then a half cosine to 0."""
    warmup = epochs / 9  # MAE's 10 of 90
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
