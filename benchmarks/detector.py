"""What a step of Mask R-CNN costs here, before 25 epochs are started: `mrmae benchmark detector`.

    mrmae benchmark detector image_size=512
    mrmae benchmark detector students=[mrmae_vit_base_patch16] image_size=1024 batch_size=4

Forward, backward and AdamW on noise with `objects` objects an image, which is what COCO has on average: proposals are
then as many as in training, for their number is fixed. GMACs are of the forward pass, counted by torch.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.assembly.detectors import build_detector
from pipeline.config import Config
from pipeline.detection import Detector, DetectorConfig, Encoder
from pipeline.errors import ConfigError

_CATEGORIES = [(number, str(number)) for number in range(1, 81)]  # as many as COCO has


class BenchmarkDetectorConfig(Config):
    """What to time, and how often."""

    students: list[str] = Field(default=["mrmae_vit_base_patch16", "mrmae_convvit_base_patch16"], min_length=1)
    image_size: int = Field(default=1024, ge=32)
    batch_size: int = Field(default=1, gt=0)
    objects: int = Field(default=7, gt=0)  # in an image
    detector: DetectorConfig = DetectorConfig()
    gradient_checkpointing: bool = False
    rounds: int = Field(default=3, ge=0)  # after one that warms up; 0 counts multiply-adds and times nothing
    device: Literal["auto", "cpu", "cuda"] = "auto"  # bf16 on CUDA, fp32 on a CPU
    threads: int | None = Field(default=None, gt=0)  # CPU threads; torch's choice unless given
    seed: int = 0


def run(config: BenchmarkDetectorConfig) -> dict[str, Any]:
    """Time every student; returns the figures as JSON-able values.

    Raises:
        ConfigError: device=cuda without one; an unknown student.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no CUDA device here: use device=cpu")
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": "bf16" if device.type == "cuda" else "fp32",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "image_size": config.image_size,
        "batch_size": config.batch_size,
        "students": {name: _measure(config, name, device) for name in config.students},
    }


def _measure(config: BenchmarkDetectorConfig, name: str, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(config.seed)
    encoder = {
        "name": name,
        "image_size": config.image_size,
        "gradient_checkpointing": config.gradient_checkpointing,
    }
    model, _ = build_detector(encoder, _CATEGORIES, **config.detector.model_dump())
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    batch = _noise(config, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    figures: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "gmacs_an_image": {part: round(macs, 2) for part, macs in _gmacs(model, batch).items()},
    }
    if not config.rounds:
        return figures
    seconds = [_step(model, optimizer, batch, device) for _ in range(config.rounds + 1)][1:]
    median = statistics.median(seconds)
    figures |= {
        "step_s": round(median, 3),
        "step_s_range": [round(min(seconds), 3), round(max(seconds), 3)],
        "images_per_s": round(config.batch_size / median, 3),
    }
    if device.type == "cuda":
        figures["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return figures


def _noise(config: BenchmarkDetectorConfig, device: torch.device) -> tuple[Any, ...]:
    """images, sizes, targets: boxes of a tenth to a half of the canvas, their masks full."""
    B, S, N = config.batch_size, config.image_size, config.objects
    images = torch.randn(B, 3, S, S, device=device)
    targets = []
    for _ in range(B):
        corner, side = torch.rand(N, 2) * 0.5 * S, (0.1 + 0.4 * torch.rand(N, 2)) * S
        boxes = torch.cat([corner, corner + side], dim=1)
        masks = torch.zeros(N, S, S, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        target = {"boxes": boxes, "labels": torch.randint(1, len(_CATEGORIES) + 1, (N,)), "masks": masks}
        targets.append({key: value.to(device) for key, value in target.items()})
    return images, [(S, S)] * B, targets


def _step(model: Detector, optimizer: torch.optim.Optimizer, batch: tuple[Any, ...], device: torch.device) -> float:
    _synchronise(device)
    began = time.perf_counter()
    _loss(model, batch, device).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    _synchronise(device)
    return time.perf_counter() - began


def _loss(model: Detector, batch: tuple[Any, ...], device: torch.device) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        return model(*batch)["loss"]  # type: ignore[no-any-return]


def _gmacs(model: Detector, batch: tuple[Any, ...]) -> dict[str, float]:
    """Multiply-adds of an image's forward pass, in thousands of millions: the encoder's, and all."""
    images = batch[0]
    encoder: Encoder = model.rcnn.backbone.encoder
    parts: dict[str, Callable[[], Any]] = {
        "encoder": lambda: encoder.forward_maps(images),
        "all": lambda: model(*batch),
    }
    totals = {}
    for part, forward in parts.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            forward()
        totals[part] = counter.get_total_flops() / 2e9 / len(images)
    return totals


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
