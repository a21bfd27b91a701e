"""Mask R-CNN: losses, negatives, the heads as they should be, precision, and the way back to the original sizes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.detection import CocoImages, DetectionBatch, DetectionDataset, Detector, JitterConfig
from pipeline.errors import ConfigError

Build = Callable[..., Detector]
NAMES = {"loss", "loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}


def batch_of(coco: CocoImages, *indices: int) -> DetectionBatch:
    dataset = DetectionDataset(coco, 64, jitter=JitterConfig(scale=(1.0, 1.0)))
    return dataset.__getitems__([(0, index) for index in indices])


def losses_of(model: Detector, batch: DetectionBatch) -> dict[str, Tensor]:
    losses: dict[str, Tensor] = model(batch.images / 255 - 0.5, batch.sizes, batch.targets)
    return losses


def test_losses_and_gradients_for_every_parameter(detector: Build, kind: str, coco: CocoImages) -> None:
    model = detector(kind).train()
    losses = losses_of(model, batch_of(coco, 0, 1))
    assert set(losses) == NAMES
    parts = torch.stack([value for name, value in losses.items() if name != "loss"])
    torch.testing.assert_close(losses["loss"], parts.sum())
    losses["loss"].backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_a_batch_without_any_object_trains(detector: Build, kind: str, coco: CocoImages) -> None:
    model = detector(kind).train()
    losses = losses_of(model, batch_of(coco, 1, 1))
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    assert losses["loss_mask"] == 0
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_two_images_are_learnt(detector: Build, kind: str, coco: CocoImages) -> None:
    """Coloured rectangles: the loss falls to less than half."""
    model, batch = detector(kind).train(), batch_of(coco, 0, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    seen = []
    for _ in range(100):
        loss = losses_of(model, batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert sum(seen[-5:]) < 0.5 * sum(seen[:5])


def test_detections_come_back_in_pixels_of_the_originals(detector: Build, kind: str, coco: CocoImages) -> None:
    model = detector(kind, score_threshold=0.0).eval()
    batch = DetectionDataset(coco, 64).__getitems__([(0, 0), (0, 1)])
    with torch.inference_mode():
        (found, _) = model.detect(batch.images / 255 - 0.5, batch.sizes, [(640, 960), (64, 96)])
    n = len(found["scores"])
    assert 0 < n <= 100
    assert found["masks"].shape == (n, 640, 960)
    assert found["masks"].dtype == torch.bool
    assert found["boxes"][:, [0, 2]].max() <= 960
    assert found["boxes"][:, 2].max() > 96  # and not in those of the canvas
    assert (found["scores"].diff() <= 0).all()
    assert found["labels"].min() >= 1
    assert found["labels"].max() <= 3


def test_boxes_end_where_the_image_does(detector: Build, coco: CocoImages) -> None:
    """Not in the padding of the canvas."""
    model = detector("vit", score_threshold=0.0).eval()
    batch = DetectionDataset(coco, 64).__getitems__([(0, 0)])
    with torch.inference_mode():
        (found,) = model.detect(batch.images / 255 - 0.5, batch.sizes, batch.sizes)
    assert batch.sizes == [(43, 64)]
    assert found["boxes"][:, 3].max() <= 43


def test_pooling_does_not_depend_on_what_came_first(detector: Build, coco: CocoImages) -> None:
    """torchvision infers the levels' scales from the first images; a small one would spoil all that follow."""
    fresh, used = detector("vit").eval(), detector("vit").eval()
    used.load_state_dict(fresh.state_dict())
    with torch.inference_mode():
        used.detect(torch.randn(1, 3, 64, 64), [(7, 9)], [(7, 9)])
        images, sizes = torch.randn(1, 3, 64, 64), [(64, 64)]
        one, two = fresh.detect(images, sizes, sizes)[0], used.detect(images, sizes, sizes)[0]
    torch.testing.assert_close(one["boxes"], two["boxes"])


def test_standard_anchors_and_heads(detector: Build) -> None:
    from pipeline.detection import DetectorConfig
    from pipeline.models import build_classifier

    encoder = build_classifier("mrmae_vit_tiny_patch16", 1, image_size=64).encoder
    model = Detector(encoder, classes=80, spec={}, **DetectorConfig().model_dump())
    rcnn, heads = model.rcnn, model.rcnn.roi_heads
    assert rcnn.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert len(rcnn.rpn.head.conv) == 2
    assert heads.box_roi_pool.output_size == (7, 7)
    assert heads.mask_roi_pool.output_size == (14, 14)
    assert heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    boxes = [torch.tensor([[0, 0, side, side] for side in (20.0, 112.0, 225.0, 448.0, 900.0)])]
    assert heads.box_roi_pool.map_levels(boxes).tolist() == [0, 1, 2, 3, 3]
    kinds = [
        type(part).__name__ for block in heads.box_head for part in (block if len(list(block.children())) else [block])
    ]
    assert kinds == ["Conv2d", "LayerNorm2d", "ReLU"] * 4 + ["Flatten", "Linear", "ReLU"]
    assert heads.box_predictor.cls_score.out_features == 81
    assert heads.mask_predictor.mask_fcn_logits.out_channels == 81


def test_bf16_moves_boxes_by_less_than_a_pixel(detector: Build, coco: CocoImages) -> None:
    """Anchors, offsets and boxes stay float32 under autocast."""
    model = detector("vit", score_threshold=0.0).eval()
    anchors = {}
    model.rcnn.rpn.anchor_generator.register_forward_hook(lambda _, __, out: anchors.update(dtype=out[0].dtype))
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        (found,) = model.detect(images, [(64, 64)], [(64, 64)])
    assert anchors["dtype"] == torch.float32
    assert {found[key].dtype for key in ("boxes", "scores")} == {torch.float32}
    fractions = found["boxes"].frac().abs()
    assert (fractions * 1024 % 4).abs().sum() > 0  # finer than bf16 has between 32 and 64


def test_an_odd_grid_is_refused(detector: Build) -> None:
    with pytest.raises(ConfigError, match="image_size=72: give a multiple of 16"):
        detector("vit", image_size=72)
