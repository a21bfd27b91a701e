"""Networks of timm that give a map of features, and whose inputs can't be masked: CNNs, Swin, ConvNeXt.

They learn from whole views (objective "distil"), and are measured, fine-tuned and exported as other students are.
"""

from typing import Any

import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.errors import ConfigError
from pipeline.models.sizes import Size
from pipeline.models.timm_names import OwnPixels, TimmModel


class FeatureMap(nn.Module):
    """A model of timm without its head; its last map's cells are its tokens. Parameters have timm's names in `model`.

    Batch norms work as usual: statistics of the batch in training, kept ones elsewhere. What the last map doesn't
    depend on (layers between it and the classifier) isn't trained.

    Args:
        named: what timm has under the student's name.
        size: of the images; all else is the model's.
        drop_path: stochastic depth, for models that know it.
        gradient_checkpointing: as timm does it for the model; batch norms count each batch once.
    """

    num_prefix_tokens = 0
    attention_query = "none"
    pos_embed = None

    def __init__(
        self, named: TimmModel, size: Size, *, drop_path: float = 0.0, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.named, self.image_size, self.patch_size = named, size.image_size, size.patch_size
        options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
        try:
            model: Any = timm.create_model(named.name, num_classes=0, **options)
        except TypeError as error:
            if not drop_path or "drop_path_rate" not in str(error):
                raise
            raise ConfigError(f"timm:{named.name} has no stochastic depth: set drop_path=0") from error
        if hasattr(model, "set_input_size"):  # windows and positions fit one size
            model.set_input_size(size.image_size)
        self.model = model
        self._in_forward = False
        self._held: dict[_BatchNorm, float | None] = {}  # momentum, while a batch norm computes something again
        self.blocks, self.norm = nn.ModuleList(), nn.Identity()  # as other encoders have them
        self.to_own = OwnPixels(named)
        self.dim, self.grid = self._probe()
        if gradient_checkpointing:
            model.set_grad_checkpointing(True)
            for norm in model.modules():
                if isinstance(norm, _BatchNorm):
                    norm.register_forward_pre_hook(self._hold_statistics)
                    # Always: torch ends the second forward pass by an exception, within the last module that it needs.
                    norm.register_forward_hook(self._release_statistics, always_call=True)

    def own_pixels(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] as students take them, normalised as the weights were trained."""
        pixels: Tensor = self.to_own(images)
        return pixels

    def pooled_norm(self) -> nn.Module:
        """None: a classifier reads the mean of the map as it is, as CNNs do."""
        return nn.Identity()

    def forward_blocks(self, images: Tensor, ids_keep: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """The last map of whole images as tokens [B, h*w, C]."""
        assert ids_keep is None
        return self(images).flatten(2).transpose(1, 2), []

    def forward_tokens(self, images: Tensor) -> Tensor:
        """The last map of images [B, 3, H, W] as tokens [B, h*w, C]."""
        return self.forward_blocks(images)[0]

    @property
    def map_dims(self) -> tuple[int, ...]:
        """Channels of each map of `forward_maps`."""
        return (self.dim,)

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """The last map [B, C, h, w]."""
        self._in_forward = True
        try:
            maps: list[Tensor] = self.model.forward_intermediates(
                self.own_pixels(images), 1, output_fmt="NCHW", intermediates_only=True
            )
        finally:
            self._in_forward = False
        return maps[-1:]

    def _hold_statistics(self, norm: _BatchNorm, _arguments: Any) -> None:
        """What gradient checkpointing computes again in the backward pass is no further batch."""
        if norm.training and not self._in_forward:
            self._held[norm], norm.momentum = norm.momentum, 0.0
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.sub_(1)

    def _release_statistics(self, norm: _BatchNorm, _arguments: Any, _result: Any) -> None:
        if norm in self._held:
            norm.momentum = self._held.pop(norm)

    def layers(self) -> tuple[dict[str, int], int]:
        """The stage of every parameter, the stem's is 0, and the number of stages."""
        groups = group_parameters(self.model, self.model.group_matcher(coarse=True), reverse=True)
        return {f"model.{name}": stage for name, stage in groups.items()}, max(groups.values()) + 1

    def forward(self, images: Tensor) -> Tensor:
        """The last map [B, C, h, w]."""
        return self.forward_maps(images)[0]

    def _probe(self) -> tuple[int, tuple[int, int]]:
        """Channels and cells of the last map; freezes the parameters that it doesn't depend on.

        On the meta device, so that nothing is computed.

        Raises:
            ConfigError: the network can't be asked for its last map.
        """
        training = self.training
        self.eval()
        with torch.inference_mode(False), torch.enable_grad():
            parameters = {name: _shape_of(value).requires_grad_() for name, value in self.named_parameters()}
            buffers = {name: _shape_of(value) for name, value in self.named_buffers()}
            images = torch.empty(1, 3, *self.image_size, device="meta")
            try:
                last = functional_call(self, {**parameters, **buffers}, (images,))
            except (AttributeError, TypeError, ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"timm:{self.named.name} gives no map of features for images of {self.image_size[0]} x "
                    f"{self.image_size[1]} pixels ({str(error).splitlines()[0]}): choose another model or size"
                ) from error
            used = torch.autograd.grad(last.sum(), list(parameters.values()), allow_unused=True)
        for parameter, grad in zip(self.parameters(), used, strict=True):
            parameter.requires_grad_(grad is not None)
        self.train(training)
        return last.shape[1], (last.shape[2], last.shape[3])


def _shape_of(value: Tensor) -> Tensor:
    return torch.empty_like(value, device="meta")
