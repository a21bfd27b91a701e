"""MR-MAE (Mimic before Reconstruct, arXiv 2303.05475): the encoder mimics a teacher, the decoder reconstructs pixels.

    student = build_student("mrmae_convvit_base_patch16", teachers={"clip_vitb16": 768})
    losses = student(images, ids_keep, {"clip_vitb16": targets})
    losses["loss"].backward()

The two losses are on different tokens and at different depths: the features of the visible tokens after the encoder,
and the pixels of the masked cells after the decoder. `objective` moves or removes one of them, for comparison:

| objective       | pixels of masked cells | teacher's tokens, predicted from           | target rows |
|-----------------|------------------------|--------------------------------------------|-------------|
| mr_mae          | yes                    | the encoder's visible tokens               | visible     |
| mae             | yes                    | –                                          | none        |
| feature_encoder | –                      | the encoder's visible tokens; no decoder   | visible     |
| feature_decoder | –                      | the decoder's tokens at masked cells       | masked      |
| joint_decoder   | yes                    | the decoder's tokens at masked cells       | masked      |
| distil          | –                      | the last map of whole views; no decoder    | all         |

A plug-in may register more of them in `OBJECTIVES`, with a loss of its own between the tokens and the teacher's.
`predict_share` may draw some of the masked cells; then these are all that a decoder predicts, pixels and tokens alike.
With `target` "codes" the clusters of the teacher's tokens are predicted in place of the tokens.
With `summary_weight` above 0 there is a third loss for each teacher, on its class token (`pipeline.models.summary`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.configs.models import DropTeachers, SummarySource
from pipeline.configs.objectives import OBJECTIVES
from pipeline.errors import ConfigError
from pipeline.models.convvit import ConvViT
from pipeline.models.feature_map import FeatureMap
from pipeline.models.flat import flatten_parts
from pipeline.models.mae import Decoder, pixel_loss
from pipeline.models.masking import complement, gather_tokens
from pipeline.models.mimic import Mimic
from pipeline.models.patches import as_map, patchify, resize_map
from pipeline.models.summary import SummaryHead, student_summary
from pipeline.models.vit import PlainViT

Encoder = PlainViT | ConvViT | FeatureMap


# Parts of an encoder that only a decoder reads.
FOR_DECODER = frozenset({"norm", "stage1_output_decode", "stage2_output_decode"})


class Student(nn.Module):
    """Encoder, decoder and one `Mimic` for each teacher; built by `build_student`.

    `grid` is (h, w) cells of the targets. `target_rows` says which cells' teacher tokens `forward` wants: "visible",
    "masked", "none".

    Args:
        decoder: None for the objective "feature_encoder"; what the encoder has for a decoder is then not trained.
        predict_share: share of all cells that a step predicts, at most the masked ones; see `predicted_cells`.
        mimics: teacher name -> its `Mimic`, its `CodeMimic`, or the loss of a plug-in; empty for the objective "mae".
        summaries: teacher name -> its `SummaryHead`; empty without the summary loss.
        summary_source: the student's vector that predicts summaries.
        teacher_shares: teacher name -> share of the mimic loss; shares add up to 1.
        drop_teachers: in training, drop some teachers of each sample from the mimic loss. True: it mimics one, sampled
            by these shares. "loss": it mimics the one of its highest loss, and each other with probability 1/2 (UNIC's
            teacher dropping, arXiv 2408.05088). Dropped ones have weight zero, and the weights of a sample add up to 1
            on average. So every head takes part in every step, as DDP needs.
        grid: (h, w) cells of the targets, to which objective "distil" resizes the encoder's map; None for its own.
        spec: the keyword arguments that rebuild this model.
    """

    shares: Tensor

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder | None,
        mimics: Mapping[str, nn.Module],
        summaries: Mapping[str, SummaryHead],
        *,
        predict_share: float,
        objective: str,
        norm_pix_loss: bool,
        mimic_weight: float,
        pixel_weight: float,
        summary_weight: float,
        summary_source: SummarySource,
        teacher_shares: Mapping[str, float],
        drop_teachers: DropTeachers,
        grid: tuple[int, int] | None,
        spec: dict[str, Any],
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.predict_share = predict_share
        self.mimic = nn.ModuleDict({module_name(teacher): mimic for teacher, mimic in mimics.items()})
        self.summary = nn.ModuleDict({module_name(teacher): head for teacher, head in summaries.items()})
        self.teachers = tuple(mimics)
        self.objective = OBJECTIVES[objective]
        self.grid, self.target_rows = grid or encoder.grid, self.objective.target_rows
        self.norm_pix_loss = norm_pix_loss
        self.mimic_weight, self.pixel_weight = mimic_weight, pixel_weight
        self.summary_weight, self.summary_source = summary_weight, summary_source
        self.register_buffer("shares", torch.tensor([teacher_shares[t] for t in self.teachers]), persistent=False)
        self.drop_teachers = drop_teachers if len(self.teachers) > 1 else False
        self.spec = spec
        flatten_parts(self, "encoder", *(["decoder"] if decoder else []))
        if decoder is None:
            for name, part in encoder.named_children():
                if name in FOR_DECODER:
                    part.requires_grad_(False)

    def set_channel_stats(self, teacher: str, mean: Tensor, std: Tensor) -> None:
        """Give a teacher's channel means and deviations [width], which target_norm "channel" needs (and "none" when
        several teachers are standardised).

        Raises:
            ConfigError: unknown teacher, or another number of channels than its targets.
        """
        self._of_tokens(teacher).set_stats(mean, std)

    def set_covariance(self, teacher: str, mean: Tensor, covariance: Tensor) -> None:
        """Give the mean [width] and covariance [width, width] of a teacher's tokens, which target_norm "phi_s" needs.

        Raises:
            ConfigError: as `set_channel_stats`; also a width that PHI-S has no rotation for.
        """
        self._of_tokens(teacher).set_covariance(mean, covariance)

    def set_dispersion(self, teacher: str, dispersion: Tensor) -> None:
        """Give the `angular_dispersion` (a scalar) of a teacher's summaries, by which several teachers are balanced.

        Raises:
            ConfigError: unknown teacher.
        """
        self._mimic(teacher)
        self._summary(teacher).dispersion.copy_(dispersion)

    def forward(
        self,
        images: Tensor,
        ids_keep: Tensor,
        targets: Mapping[str, Tensor] | None = None,
        ids_predict: Tensor | None = None,
        summaries: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """One training step's losses.

        Args:
            images: [B, 3, H, W] normalised float.
            ids_keep: [B, K] int64, the visible cells; 0 < K < L. With objective "distil" all of them, ascending.
            targets: teacher -> [B, R, D] raw teacher tokens (any float dtype), for the cells that `target_rows` names:
                "visible": R = K, in `ids_keep` order; "masked": R = P, in the order of the predicted cells. With
                target "codes" [B, R] int64, the cluster of each.
            ids_predict: [B, P] int64, the masked cells that are predicted; all of them unless given, ascending.
            summaries: teacher -> [B, D] its raw class tokens, if the student has the summary loss.

        Returns:
            float32 scalars `loss`, `pixel_loss`, `mimic_loss` and `summary_loss` (each only if the student has it; with
            several teachers also `mimic_loss/<teacher>` and `summary_loss/<teacher>`, before weighting). If pixels are
            predicted also `pred` [B, P, p*p*3], those of the predicted cells.

        Raises:
            ConfigError: a teacher's targets are missing, of another shape, or lack the statistics they need.
        """
        result: dict[str, Tensor] = {}
        if not self.objective.masks:
            last, _ = self.encoder.forward_blocks(images)
            resized = resize_map(as_map(last[:, self.encoder.num_prefix_tokens :], self.encoder.grid), self.grid)
            tokens = [resized.flatten(2).transpose(1, 2)]  # [B, L, D]
        elif self.decoder is None:
            last, tokens = self.encoder.forward_blocks(images, ids_keep)
        else:
            if ids_predict is None:
                ids_predict = complement(ids_keep, self.grid[0] * self.grid[1])  # [B, L-K]
            encoded = self.encoder(images, ids_keep)
            decoded = self.decoder(encoded.latent, ids_keep, ids_predict)  # [B, P, d]
            last, tokens = encoded.last, encoded.hidden if self.objective.mimics == "encoder" else [decoded]
            if self.objective.pixels:
                result["pred"] = self.decoder.predict_pixels(decoded)  # [B, P, p*p*3]
                true = gather_tokens(patchify(images, self.encoder.patch_size), ids_predict)  # [B, P, p*p*3]
                result["pixel_loss"] = pixel_loss(result["pred"], true, self.norm_pix_loss)

        loss = images.new_zeros((), dtype=torch.float32)
        if self.objective.mimics:
            result |= self._mimic_losses(tokens, targets or {})
            loss = loss + self.mimic_weight * result["mimic_loss"]
        if self.summary:
            result |= self._summary_losses(last, summaries or {})
            loss = loss + self.summary_weight * result["summary_loss"]
        if self.objective.pixels:
            loss = loss + self.pixel_weight * result["pixel_loss"]
        return {"loss": loss, **result}

    def _mimic_losses(self, tokens: list[Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        missing = [teacher for teacher in self.teachers if teacher not in targets]
        if missing:
            raise ConfigError(
                f"no targets of {', '.join(missing)}: this student was built to mimic them; pass their tokens"
            )
        found = [self._mimic(teacher)(tokens, targets[teacher]) for teacher in self.teachers]
        batch = tokens[-1].shape[:1]
        if self.objective.loss is not None and any(loss.shape != batch for loss in found):
            shapes = ", ".join(str(list(loss.shape)) for loss in found)
            raise ConfigError(
                f"the loss of objective={self.spec['objective']} has the shape {shapes} for a batch of {batch[0]}: "
                "return one number for each sample"
            )
        losses = torch.stack(found, 1)  # [B, T]
        result = {"mimic_loss": (losses * self._shares(losses)).sum(1).mean()}
        if len(self.teachers) > 1:
            means = losses.mean(0)
            result |= {f"mimic_loss/{teacher}": means[i] for i, teacher in enumerate(self.teachers)}
        return result

    def _summary_losses(self, last: Tensor, summaries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        missing = [teacher for teacher in self.teachers if teacher not in summaries]
        if missing:
            raise ConfigError(f"no summaries of {', '.join(missing)}: pass their class tokens, or use summary_weight=0")
        vector = student_summary(last, self.encoder.num_prefix_tokens, self.summary_source)
        losses = torch.stack([self._summary(t)(vector, summaries[t]).mean() for t in self.teachers])  # [T]
        result = {"summary_loss": (losses * self.shares).sum()}
        if len(self.teachers) > 1:
            result |= {f"summary_loss/{teacher}": losses[i] for i, teacher in enumerate(self.teachers)}
        return result

    def _shares(self, losses: Tensor) -> Tensor:
        """Each teacher's share of each sample's loss [B or 1, T]."""
        shares = self.shares.unsqueeze(0)  # [1, T]
        if not (self.drop_teachers and self.training):
            return shares
        if self.drop_teachers == "loss":
            worst = nn.functional.one_hot(losses.argmax(1), len(self.teachers)).to(losses.dtype)  # [B, T]
            kept = worst.maximum((torch.rand_like(worst) < 0.5).to(losses.dtype))
            expected = (1 + (shares * worst).sum(1, keepdim=True)) / 2  # [B, 1] what is kept of all shares, on average
            return shares * kept / expected
        below = shares.cumsum(1) - shares  # [1, T] the start of each teacher's part of [0, 1)
        chosen = (torch.rand(losses.shape[0], 1, device=losses.device) >= below[:, 1:]).sum(1)  # [B]
        return nn.functional.one_hot(chosen, len(self.teachers)).to(losses.dtype)

    def _of_tokens(self, teacher: str) -> Mimic:
        mimic = self._mimic(teacher)
        if not isinstance(mimic, Mimic):
            raise ConfigError(f"the targets of '{teacher}' take no statistics: leave them out")
        return mimic

    def _mimic(self, teacher: str) -> nn.Module:
        if teacher not in self.teachers:
            raise ConfigError(f"this student has no teacher '{teacher}': it has {', '.join(self.teachers) or 'none'}")
        return self.mimic[module_name(teacher)]

    def _summary(self, teacher: str) -> SummaryHead:
        return self.summary[module_name(teacher)]  # type: ignore[return-value]  # ModuleDict forgets the type


def module_name(teacher: str) -> str:
    """A teacher's name where a dot can't stand: in the names of modules."""
    return teacher.replace(".", "_")
