"""Running statistics of batch norms, which no optimiser trains: of averaged weights, and of several processes."""

from collections.abc import Iterable

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from pipeline.processes import processes


def has_statistics(model: nn.Module) -> bool:
    """Whether the model's output in eval mode depends on what batch norms kept of training batches."""
    return bool(_statistics(model))


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Give every process the mean over all processes, each of which kept those of its own batches."""
    kept = _statistics(model)
    if not kept or processes().num_processes == 1:
        return
    # In float64, so that equal ones stay what they are.
    means = reduce(torch.cat([values.flatten() for values in kept]).double(), "mean")
    for values, mean in zip(kept, means.split([values.numel() for values in kept]), strict=True):
        values.copy_(mean.view_as(values))


def retake_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Take them anew, as the mean over `batches` of all processes: those of averaged weights are no average.

    Args:
        batches: this process's share, normalised images [B, 3, H, W] on the model's device.
    """
    update_bn(batches, model)
    average_statistics(model)


def _statistics(model: nn.Module) -> list[Tensor]:
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [values for norm in norms for values in (norm.running_mean, norm.running_var) if isinstance(values, Tensor)]
