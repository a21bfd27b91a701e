"""A moving average of the weights, which a run may evaluate and keep in place of the weights themselves (timm's)."""

from timm.utils.model_ema import ModelEmaV3
from torch import nn

from pipeline.configs.training import EmaConfig


def build_ema(model: nn.Module, config: EmaConfig) -> ModelEmaV3 | None:
    """An average of `model` as it is now, on its device, or None where none is wanted.

    Its `module` holds the average, and `update(model, step)` brings it on after optimiser step `step` (from 1). The
    decay is a function of the step, so the module's weights are all that a checkpoint has to keep.
    """
    if config.decay is None:
        return None
    return ModelEmaV3(model, decay=config.decay, use_warmup=config.warmup)
