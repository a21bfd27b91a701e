"""Mimicking one teacher: from student tokens to a prediction of the teacher's, and the loss between them.

`Mimic` predicts the tokens themselves, `CodeMimic` the cluster of each.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.configs.models import Fusion, MimicHead, MimicLoss, TargetNorm
from pipeline.errors import ConfigError
from pipeline.models.phi_s import phi_s_rotation
from pipeline.models.vit import initialise


class _Predictor(nn.Module):
    """The head for one teacher.

    Tokens come from S sources: encoder blocks, or the decoder. They are LayerNormed without parameters, since the head
    follows. Fusion "fused" makes one prediction from their learned average, in which the last source starts with three
    quarters of the weight. "each" gives every source a head and a loss of its own. "last" has one source.

    Args:
        teacher: name, for messages.
        dim, width: channels of the student's tokens, and of a prediction.
        sources: S.
    """

    def __init__(
        self,
        teacher: str,
        *,
        dim: int,
        width: int,
        sources: int = 1,
        fusion: Fusion = "last",
        head: MimicHead = "linear",
    ) -> None:
        super().__init__()
        self.teacher, self.fusion = teacher, fusion
        if fusion == "fused" and sources > 1:
            self.fusion_logits = nn.Parameter(
                torch.zeros(sources).index_fill(0, torch.tensor(-1), math.log(3 * (sources - 1)))
            )
        self.heads = nn.ModuleList(_head(head, dim, width) for _ in range(sources if fusion == "each" else 1))
        initialise(self)

    def predict(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """One prediction [B, N, width] (S of them with fusion "each"), from S sources of tokens [B, N, dim]."""
        normed = [F.layer_norm(x, x.shape[-1:], eps=1e-6) for x in tokens]
        if self.fusion == "fused" and len(normed) > 1:
            weights = self.fusion_logits.softmax(0)
            normed = [torch.stack([w * x for w, x in zip(weights, normed, strict=True)]).sum(0)]
        return [head(x) for head, x in zip(self.heads, normed, strict=True)]


class CodeMimic(_Predictor):
    """The head and the loss for one teacher's clusters: `width` of them, each with a logit."""

    def forward(self, tokens: Sequence[Tensor], ids: Tensor) -> Tensor:
        """Cross-entropy of each sample [B] float32, from S sources of tokens [B, N, dim] and clusters int64 [B, N].

        Raises:
            ConfigError: clusters of another shape.
        """
        predictions = self.predict(tokens)
        if predictions[0].shape[:-1] != ids.shape:
            raise ConfigError(
                f"codes of '{self.teacher}' are {list(ids.shape)} where the student predicts"
                f" {list(predictions[0].shape[:-1])}: bring the rows that target_rows names"
            )
        losses = [
            F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none") for logits in predictions
        ]
        return torch.stack(losses).mean(0).view_as(ids).mean(1)


class Mimic(_Predictor):
    """The head, the target normalisation and the loss for one teacher's tokens.

    Args:
        target_norm: "layernorm" per token without parameters | "channel" standardised per channel | "phi_s" rotated, so
            that one scale standardises all channels (see `pipeline.models.phi_s`) | "none".
        standardise: with target_norm "none", shift by the channel means and divide by the one overall deviation.
        scale: the normalised target is multiplied by it. AdamW's steps don't depend on a loss's size, so this is no
            weight: the head's predictions start small beside it and follow slowly, and more is left to the encoder.
        width: channels of the teacher's tokens.
        head: the other arguments of `_Predictor`.
    """

    channel_mean: Tensor
    channel_std: Tensor
    rotation: Tensor

    def __init__(
        self,
        teacher: str,
        *,
        width: int,
        target_norm: TargetNorm = "layernorm",
        standardise: bool = False,
        scale: float = 1.0,
        loss: MimicLoss = "smooth_l1",
        **head: Any,
    ) -> None:
        super().__init__(teacher, width=width, **head)
        self.target_norm, self.standardise, self.scale, self.loss = target_norm, standardise, scale, loss
        # Not in the checkpoint: they belong to the targets, and whoever brings targets sets them again. But a rotation
        # computed again may differ, by another library or number of threads: the heads know this one alone.
        is_rotated = target_norm == "phi_s"
        self.register_buffer("channel_mean", torch.zeros(width), persistent=is_rotated)
        self.register_buffer("channel_std", torch.ones(width), persistent=False)
        size = width if is_rotated else 0
        self.register_buffer("rotation", torch.zeros(size, size), persistent=is_rotated)
        self.has_stats = False

    def set_stats(self, mean: Tensor, std: Tensor) -> None:
        """Give the teacher's channel means and deviations, [width] each, in raw teacher space."""
        if mean.shape != self.channel_mean.shape or std.shape != self.channel_std.shape:
            raise ConfigError(
                f"channel statistics of '{self.teacher}' have {mean.numel()} and {std.numel()} channels where its"
                f" targets have {self.channel_mean.numel()}: take both from the same cache"
            )
        self.channel_mean.copy_(mean)
        self.channel_std.copy_(std)
        self.has_stats = True

    def set_covariance(self, mean: Tensor, covariance: Tensor) -> None:
        """Give what target_norm "phi_s" needs: the mean [width] and covariance [width, width] of the teacher's tokens.

        Raises:
            ConfigError: they have another width, or none that PHI-S knows.
        """
        if mean.shape != self.channel_mean.shape or covariance.shape != self.rotation.shape:
            raise ConfigError(
                f"the covariance of '{self.teacher}' is {list(covariance.shape)} where its targets have"
                f" {self.channel_mean.numel()} channels: take both from the same cache"
            )
        self.channel_mean.copy_(mean)
        self.rotation.copy_(phi_s_rotation(covariance))
        self.has_stats = True

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *options: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *options)
        rotation = state_dict.get(f"{prefix}rotation")
        self.has_stats |= rotation is not None and bool(rotation.any())  # zeros were never set

    def forward(self, tokens: Sequence[Tensor], target: Tensor) -> Tensor:
        """Loss of each sample [B] float32, from S sources of tokens [B, N, dim] and raw targets [B, N, width].

        Raises:
            ConfigError: targets of another shape, or without the statistics that their normalisation needs.
        """
        predictions = self.predict(tokens)
        if predictions[0].shape != target.shape:
            raise ConfigError(
                f"targets of '{self.teacher}' are {list(target.shape)} where the student predicts"
                f" {list(predictions[0].shape)}: bring the rows that target_rows names, of the width it was built for"
            )
        target = self.normalise(target)
        return torch.stack([_loss(self.loss, prediction.float(), target) for prediction in predictions]).mean(0)

    def normalise(self, target: Tensor) -> Tensor:
        """The target [B, N, width] as the loss sees it, in fp32."""
        normalised = self._normalise(target.float())
        return normalised if self.scale == 1.0 else normalised * self.scale

    def _normalise(self, target: Tensor) -> Tensor:
        if self.target_norm == "layernorm":
            return F.layer_norm(target, target.shape[-1:])
        if self.target_norm == "none" and not self.standardise:
            return target
        if not self.has_stats:
            raise ConfigError(
                f"targets of '{self.teacher}' can't be standardised without its channel statistics:"
                f" give them by {'set_covariance' if self.target_norm == 'phi_s' else 'set_channel_stats'}, or use"
                " target_norm=layernorm"
            )
        if self.target_norm == "phi_s":
            with torch.autocast(target.device.type, enabled=False):  # its targets would be rounded to 8 bits
                return (target - self.channel_mean) @ self.rotation.T
        scale = self.channel_std if self.target_norm == "channel" else self.channel_std.square().mean().sqrt()
        return (target - self.channel_mean) / scale


def _head(kind: str, dim: int, width: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(dim, width)
    return nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, width))


def _loss(kind: str, prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens (and channels) for each sample: [B, N, D] twice to [B]."""
    if kind == "cosine":
        return (1 - F.cosine_similarity(prediction, target, dim=-1)).mean(1)
    elementwise = F.smooth_l1_loss if kind == "smooth_l1" else F.mse_loss
    return elementwise(prediction, target, reduction="none").mean((1, 2))
