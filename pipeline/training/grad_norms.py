"""How hard each loss pulls at the encoder: published work found the weights between such losses fragile.

Taken on one micro-batch now and then, by a forward and a backward of its own for each loss, so that the step itself,
its random numbers and its hooks (compiled graphs, DDP) stay as they are.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn


class GradNorms:
    """Norms of the gradients of single losses.

    Args:
        parts: names of the losses, as the model returns them; those that it doesn't return are left out.
        parameters: where the gradient is taken, the encoder's.
        every: steps between two measurements; 0 for never.
    """

    def __init__(self, parts: Sequence[str], parameters: Sequence[nn.Parameter], every: int) -> None:
        self.parts, self.every = parts, every
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]

    def due(self, step: int) -> bool:
        """Whether step number `step` (from 0) is one to measure at."""
        return bool(self.every) and step % self.every == 0

    def measure(self, losses: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """`grad_norm/<part>` of each part, scalars on the device; `losses` runs the model anew on the same batch."""
        norms: dict[str, Tensor] = {}
        for part in self.parts:
            values = losses()
            if part in values:
                gradients = torch.autograd.grad(values[part], self.parameters, allow_unused=True)
                present = [gradient.norm() for gradient in gradients if gradient is not None]
                norms[f"grad_norm/{part}"] = torch.stack(present).norm() if present else values[part].new_zeros(())
        return norms
