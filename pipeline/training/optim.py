"""AdamW groups with layer-wise decay, and the learning rate as a pure function of the step."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.configs.training import OptimConfig

# Beside biases and norms (one dimension), these are never decayed: they are positions in space, not weights.
_UNDECAYED = ("pos_embed", "cls_token", "reg_token", "mask_token", "freqs")


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up from 0, then half a cosine down to `min_lr` (Loshchilov and Hutter 2017, as MAE applies it)."""

    peak: float
    minimum: float
    warmup_steps: int
    total_steps: int

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.minimum + (self.peak - self.minimum) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def describe_rate(optim: OptimConfig, batch_size: int, schedule: CosineSchedule) -> str:
    """The rates in use, and the keys that they follow from."""
    source = "optim.lr" if optim.lr is not None else f"optim.blr={optim.blr:g} x {batch_size} / 256; optim.lr sets it"
    return (
        f"learning rate: up to {schedule.peak:.3g} ({source}) after {schedule.warmup_steps} steps of warm-up, then "
        f"a cosine down to {schedule.minimum:g}"
    )


def cosine_schedule(optim: OptimConfig, batch_size: int, steps_per_epoch: int, total_steps: int) -> CosineSchedule:
    """The rate of every step; the warm-up takes half of the run at most."""
    share = total_steps / 10 if optim.warmup_epochs is None else optim.warmup_epochs * steps_per_epoch
    warmup = min(round(share), total_steps // 2)
    return CosineSchedule(optim.peak_lr(batch_size), optim.min_lr, warmup, total_steps)


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_ids: Mapping[str, int] | None = None, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Parameters by (layer, decayed or not), each group with its `lr_scale`.

    A parameter of layer i out of n = max(layer_ids) learns at layer_decay ** (n - i) times the rate, and the head at
    the full one (BEiT, arXiv 2106.08254, as MAE fine-tunes).
    """
    layers = layer_ids or {}
    top = max(layers.values(), default=0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layers.get(name, top)
        decayed = parameter.ndim > 1 and not name.rsplit(".", 1)[-1].endswith(_UNDECAYED)
        group = groups.setdefault(
            (layer, decayed),
            {"params": [], "weight_decay": weight_decay if decayed else 0.0, "lr_scale": layer_decay ** (top - layer)},
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def build_adamw(groups: Iterable[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the groups; the rate is set before every step, so the initial one is 0."""
    return torch.optim.AdamW(list(groups), lr=0.0, betas=config.betas, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
