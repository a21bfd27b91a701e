"""Training steps of Mask R-CNN on a student.

Gives seconds, multiply-adds and, on a GPU, memory:

    mrmae benchmark detector image_size=512
    mrmae benchmark detector 'students=[mrmae_vit_base_patch16]' image_size=1024 batch_size=4

A step is forward, backward and AdamW, on noise with `objects` objects an image, as many as COCO has on average. Noise
costs what images cost, because the number of proposals is fixed. GMACs are of the forward pass, counted by torch.

Reads and writes nothing. Costs minutes on a CPU.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.configs.detector import BenchmarkDetectorConfig
from benchmarks.harness import Bench, by_turns, count_gmacs, median_and_range, open_bench
from pipeline.assembly.detectors import build_detector
from pipeline.detection import Encoder

_CATEGORIES = [(number, str(number)) for number in range(1, 81)]  # as many as COCO has


def run(config: BenchmarkDetectorConfig) -> dict[str, Any]:
    """Measure every student; returns JSON-able figures.

    Raises:
        ConfigError: device=cuda without one; an unknown student.
    """
    with open_bench(config.device, threads=config.threads) as bench:
        return bench.report(config, {"students": {name: _measure(config, name, bench) for name in config.students}})


def _measure(config: BenchmarkDetectorConfig, name: str, bench: Bench) -> dict[str, Any]:
    torch.manual_seed(config.seed)
    student = {"name": name, "image_size": config.image_size, "gradient_checkpointing": config.gradient_checkpointing}
    model, _ = build_detector(student, _CATEGORIES, **config.detector.model_dump())
    model = model.to(bench.device).train()
    encoder: Encoder = model.rcnn.backbone.encoder
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    batch = _noise(config, bench.device)

    def step() -> None:
        with bench.autocast():
            loss: Tensor = model(*batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        gmacs = {
            "encoder": count_gmacs(lambda: encoder.forward_maps(batch[0])),
            "all": count_gmacs(lambda: model(*batch)),
        }
    figures: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "gmacs_an_image": {part: round(count / config.batch_size, 2) for part, count in gmacs.items()},
    }
    if not config.rounds:
        return figures
    rounds = by_turns(bench.lanes({"step": step}), config.rounds)
    median, spread = median_and_range(rounds.seconds["step"])
    images_per_s = round(rounds.rates(config.batch_size)["step"], 3)
    figures |= {"step_s": median, "step_s_range": spread, "images_per_s": images_per_s}
    if bench.on_gpu:
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
