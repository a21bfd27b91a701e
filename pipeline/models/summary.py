"""Mimicking one teacher's class token: from one vector of the student to the direction of the teacher's summary.

The loss is the cosine distance 1 - cos(prediction, summary). Several teachers are balanced by angle, as in C-RADIOv4
(arXiv 2601.17237): summaries of one teacher may lie in a narrow cone and those of another fill the sphere, so equal
losses would not mean equal errors. Each distance is divided by the dispersion of that teacher's unit summaries s around
their mean direction m = E[s] / ‖E[s]‖:

    dispersion = E[1 - cos(s, m)] = 1 - ‖E[s]‖,  between 0 (all the same) and 1 (no common direction)

So a student that always predicts the mean direction has the loss 1 for every teacher. For small angles 1 - cos is half
the squared angle, and the quotient is that of squared angles.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.configs.models import SummarySource
from pipeline.errors import ConfigError
from pipeline.models.vit import initialise


class SummaryHead(nn.Module):
    """The head and the loss for one teacher's summaries.

    Args:
        dim, width: channels of the student's vector and of the teacher's summary.
        balanced: divide by the dispersion. It is part of the checkpoint, since a resumed run goes on with it.
    """

    dispersion: Tensor

    def __init__(self, dim: int, width: int, balanced: bool) -> None:
        super().__init__()
        self.balanced = balanced
        self.head = nn.Linear(dim, width)
        initialise(self)
        if balanced:
            self.register_buffer("dispersion", torch.ones(()))

    def forward(self, vector: Tensor, summary: Tensor) -> Tensor:
        """Loss of each sample [B] float32, from the student's vectors [B, dim] and raw summaries [B, width]."""
        distance = 1 - F.cosine_similarity(self.head(vector).float(), summary.float(), dim=-1)
        return distance / self.dispersion if self.balanced else distance


def student_summary(last: Tensor, prefix: int, source: SummarySource) -> Tensor:
    """The student's vector [B, D], of its last block's output [B, prefix + K, D]: its class token, or the mean of the
    visible patches. It is LayerNormed without parameters, since a head follows."""
    tokens = last[:, 0] if source == "class" else last[:, prefix:]
    normed = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
    return normed if source == "class" else normed.mean(1)


def angular_dispersion(summaries: Iterable[Tensor]) -> Tensor:
    """1 - ‖E[s]‖ of unit vectors s, float64 scalar, of batches of summaries [..., D] of any length.

    Raises:
        ConfigError: there are none, some are not finite, or all point in one direction.
    """
    units = [F.normalize(batch.reshape(-1, batch.shape[-1]).double(), dim=-1) for batch in summaries]
    dispersion: Tensor = 1 - torch.cat(units).mean(0).norm() if units else torch.full((), torch.nan)
    if not dispersion > 1e-9:
        raise ConfigError("the teacher gives no class tokens that differ: check its weights, or use another teacher")
    return dispersion
