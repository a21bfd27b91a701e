"""Mask R-CNN (arXiv 1703.06870) on a student's encoder: torchvision's, with the heads that ViTDet and ConvMAE use.

Two convolutions in the proposal head, four and one linear layer in the box head, four in the mask head, each with a
LayerNorm over channels; RoIAlign at 7 and 14. The data loader puts images on a square canvas, so torchvision's own
resizing is left out; its way back to the original sizes is kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from pipeline.configs.detection import LEVELS
from pipeline.detection.backbone import Backbone, Encoder
from pipeline.errors import ConfigError

Size = tuple[int, int]  # (height, width) in pixels


class Detector(nn.Module):
    """Encoder, pyramid, proposals, boxes and masks.

    Args:
        encoder: built for the canvas; see `Backbone`.
        classes: number of categories; their labels are 1 to `classes`, 0 is the background.
        spec: JSON-able description that rebuilds this detector.

    The others as in `DetectorConfig`.
    """

    dynamic_shapes = True  # as many proposals as there are

    def __init__(
        self,
        encoder: Encoder,
        *,
        classes: int,
        window: int,
        global_blocks: Sequence[int] | None,
        channels: int,
        anchors: Sequence[int],
        rois: int,
        score_threshold: float,
        max_detections: int,
        spec: dict[str, Any],
    ) -> None:
        super().__init__()
        if any(side % 2 for side in encoder.grid):
            patch = encoder.patch_size
            raise ConfigError(f"image_size={encoder.grid[0] * patch}: give a multiple of {2 * patch}, two patches")
        self.spec = spec
        shapes = AnchorGenerator(tuple((side,) for side in anchors), ((0.5, 1.0, 2.0),) * LEVELS)
        self.rcnn = MaskRCNN(
            Backbone(encoder, channels=channels, window=window, global_blocks=global_blocks),
            rpn_anchor_generator=shapes,
            rpn_head=RPNHead(channels, shapes.num_anchors_per_location()[0], conv_depth=2),
            box_roi_pool=_roi_align(7, encoder.patch_size, anchors),
            box_head=FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [4 * channels], norm_layer=LayerNorm2d),
            box_predictor=FastRCNNPredictor(4 * channels, classes + 1),
            mask_roi_pool=_roi_align(14, encoder.patch_size, anchors),
            mask_head=MaskRCNNHeads(channels, [channels] * 4, 1, norm_layer=LayerNorm2d),
            mask_predictor=MaskRCNNPredictor(channels, channels, classes + 1),
            box_batch_size_per_image=rois,
            box_score_thresh=score_threshold,
            box_detections_per_img=max_detections,
        )
        heads = self.rcnn.roi_heads
        for predictor in (self.rcnn.rpn.head, heads.box_predictor, heads.mask_predictor):
            predictor.register_forward_hook(_in_float32)

    def forward(self, images: Tensor, sizes: list[Size], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Losses of a batch; "loss" is the sum of the others.

        Args:
            images: [B, 3, S, S] normalised float, each image in the top left corner of its canvas.
            sizes: what of each canvas is image.
            targets: for each image boxes [N, 4] float32 (x1, y1, x2, y2), labels [N] int64 and masks [N, S, S] uint8;
                N may be 0.
        """
        listed, features = self._features(images, sizes)
        proposals, losses = self.rcnn.rpn(listed, features, targets)
        _, head_losses = self.rcnn.roi_heads(features, proposals, sizes, targets)
        losses = {**losses, **head_losses}
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def detect(self, images: Tensor, sizes: list[Size], original_sizes: list[Size]) -> list[dict[str, Tensor]]:
        """Detections by falling score, in pixels of the original images; call it in evaluation mode.

        Returns:
            For each image boxes [N, 4] float32, labels [N] int64, scores [N] float32, masks [N, H, W] bool.
        """
        listed, features = self._features(images, sizes)
        proposals, _ = self.rcnn.rpn(listed, features)
        detections, _ = self.rcnn.roi_heads(features, proposals, sizes)
        detections = self.rcnn.transform.postprocess(detections, sizes, original_sizes)
        return [{**image, "masks": image["masks"][:, 0] > 0.5} for image in detections]

    def _features(self, images: Tensor, sizes: list[Size]) -> tuple[ImageList, dict[str, Tensor]]:
        return ImageList(images, sizes), self.rcnn.backbone(images)


def _roi_align(output_size: int, patch_size: int, anchors: Sequence[int]) -> MultiScaleRoIAlign:
    """RoIAlign on the first four levels: boxes of 224 px (less with smaller anchors) from the one of the patch.

    torchvision would infer the levels' scales from the first images that it meets, as if they filled their canvas.
    """
    pool = MultiScaleRoIAlign(list("0123"), output_size, sampling_ratio=0)
    pool.scales = [4 / patch_size, 2 / patch_size, 1 / patch_size, 0.5 / patch_size]
    pool.map_levels = initLevelMapper(0, 3, canonical_scale=anchors[2] * 7 // 4, canonical_level=2)
    return pool


def _in_float32(_: nn.Module, __: Any, outputs: Any) -> Any:
    """Box offsets and scores leave the autocast here: in bf16 a box at pixel 1000 could only move in steps of 4."""
    return tree_map(lambda value: value.float(), outputs)
