"""Run the whole pipeline on handwritten digits.

Works offline, in under four minutes on two CPU cores. Trains a small teacher, caches its features, verifies the cache,
pre-trains MAE and MR-MAE students without labels for equal steps, and compares them. It composes the other stages: each
line of it is a command that a user could type.

Reads nothing: the digits come with scikit-learn. Writes to output, by default runs/demo. Costs a few minutes of two
cores and 50 MB.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.assembly.inspection import choose_patches, reconstruct
from pipeline.assembly.teachers import load_teacher
from pipeline.configs.teachers import TeacherConfig
from pipeline.data.images import open_images
from pipeline.data.labelled import LabelledDataset
from pipeline.evaluation.pictures import as_maps, as_pictures, draw_grid, overlay
from pipeline.evaluation.records import write_record
from pipeline.files import write_text
from pipeline.models import Student, load_model
from pipeline.ownership import stage
from pipeline.training.checkpoint import resolve_checkpoint
from pipeline.training.plots import plot_curves
from stages import extract_teacher_features, finetune, knn, linear_probe, pretrain, verify_cache
from stages.configs.demo import DemoConfig
from stages.configs.extract_teacher_features import ExtractConfig
from stages.configs.finetune import FinetuneConfig
from stages.configs.knn import KnnConfig
from stages.configs.linear_probe import LinearProbeConfig
from stages.configs.pretrain import PretrainConfig

_SIZE = 32
_ENCODER = {
    "name": "mrmae_vit_tiny_patch16",
    "image_size": _SIZE,
    "patch_size": 4,
    "dim": 96,
    "depth": 3,
    "num_heads": 3,
}
_STUDENT = {**_ENCODER, "decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 2}
_PLAIN = {"rand_augment": None, "mixup": 0.0, "cutmix": 0.0, "erase": 0.0, "hflip": 0.0, "scale": [0.75, 1.0]}


@stage
def run(config: DemoConfig, say: Callable[[str], None] = lambda line: None) -> str:
    """Run everything; returns the comparison as a Markdown table, which also lies in the output folder."""
    out = config.output
    say(f"1/6  handwritten digits → {_write_digits(out / 'digits')}")
    data = {"data": {"path": str(out / "digits/train"), "workers": 2}}
    both = {**data, "val": {"path": str(out / "digits/val"), "workers": 1}, "image_size": _SIZE, "crop": 1.0}

    teacher = _train_teacher(config, both)
    say(f"2/6  teacher, supervised, trained from scratch: top-1 {teacher['top1']:.3f}")
    _extract(config, data)
    say(f"3/6  its features for every training image → {out / 'cache'}")
    report = verify_cache.run(verify_cache.VerifyConfig(path=out / "cache", level="full"))
    say(f"4/6  the cache is {'sound' if report.sound else 'DAMAGED'}")
    for name in ("mae", "mr_mae"):
        metrics = _pretrain(config, data, name)
        say(f"5/6  {name} student, {config.max_steps} steps without labels: loss {metrics['loss']:.3f}")
    table = _compare(config, both)
    say(f"6/6  compared; pictures: {', '.join(str(path) for path in _draw(config))}")
    write_record(out, "demo", {"images": sum(1 for _ in (out / "digits/val").glob("*/*.png"))})
    write_text(out / "results.json", json.dumps(table, indent=1) + "\n")
    text = _markdown(config, table)
    write_text(out / "results.md", text)
    return f"\n{text}\nEverything lies in {out}"


def _write_digits(folder: Path) -> str:
    """1,797 real 8×8 scans as 32×32 PNGs in class folders; every fifth one is for validation."""
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        file = folder / ("train" if number % 5 else "val") / str(label) / f"{number:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
        image.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC).save(file)
    return str(folder)


def _train_teacher(config: DemoConfig, both: dict[str, Any]) -> dict[str, Any]:
    return _finetune(config, both, "teacher", config.teacher_steps, student=_ENCODER, lr=1e-3)


def _finetune(
    config: DemoConfig, both: dict[str, Any], name: str, steps: int, lr: float, **start: Any
) -> dict[str, Any]:
    optim = {"lr": lr, "warmup_epochs": 1, "betas": [0.9, 0.999], "layer_decay": 1.0}
    keys = {**both, **start, "output": config.output / name, "seed": config.seed, "max_steps": steps}
    shape = {"batch_size": 64, "drop_path": 0.0, "augment": _PLAIN, "optim": optim, "eval_every": 100}
    return finetune.run(FinetuneConfig.model_validate({**keys, **shape}))


def _extract(config: DemoConfig, data: dict[str, Any]) -> None:
    views = {"count": 4, "image_size": _SIZE, "scale": [0.75, 1.0], "hflip": 0.0, "seed": config.seed}
    keys = {"teacher": {"spec": f"mrmae:{config.output / 'teacher'}"}, "views": views, "batch_size": 256}
    cache = {"path": config.output / "cache", "samples_per_shard": 512}
    extract_teacher_features.run(ExtractConfig.model_validate({**data, **keys, "cache": cache}))


def _pretrain(config: DemoConfig, data: dict[str, Any], objective: str) -> dict[str, Any]:
    """Both students see the same views of the same cache in the same order; MAE ignores the targets."""
    keys = {
        **data,
        "cache": {"path": config.output / "cache"},
        "output": config.output / objective,
        "student": _STUDENT,
        # A patch is one pixel of the scan: normalised by itself, nothing of it would be left to predict. The loss is
        # the one by which the figures of docs/results.md were measured, not the default.
        "mimic": {"objective": objective, "norm_pix_loss": False, "mimic_loss": "smooth_l1", "target_scale": 1.0},
        "mask": {"focus": "sampled" if objective == "mr_mae" else "random"},
        "optim": {"lr": 1.5e-3, "warmup_epochs": 1},
        "batch_size": 64,
        "max_steps": config.max_steps,
        "seed": config.seed,
        "log_every": 10,
    }
    return pretrain.run(PretrainConfig.model_validate(keys))


def _compare(config: DemoConfig, both: dict[str, Any]) -> dict[str, dict[str, float]]:
    """k-NN, linear probe and fine-tuning of each student, and the references beside them."""
    out, seed = config.output, {"seed": config.seed}
    subjects: dict[str, dict[str, Any]] = {
        "untrained": {"student": _STUDENT},
        "mae": {"init": out / "mae"},
        "mr_mae": {"init": out / "mr_mae"},
        "teacher (saw labels)": {"teacher": {"spec": f"mrmae:{out / 'teacher'}"}},
        "raw pixels": {"pixels": True},
    }
    table: dict[str, dict[str, float]] = {}
    for name, subject in subjects.items():
        keys = {**both, **seed, **subject, "features": out / "features"}
        probe = {"batch_size": 64, "epochs": 60, "blrs": [4.0, 12.0, 40.0, 120.0]}  # few steps want large rates
        row = {
            "k-NN": knn.run(KnnConfig.model_validate(keys))["top1"],
            "linear probe": linear_probe.run(LinearProbeConfig.model_validate({**keys, **probe}))["top1"],
        }
        if name in ("untrained", "mae", "mr_mae"):
            start = {"student": _ENCODER} if name == "untrained" else {"init": out / name}
            tuned = _finetune(config, both, f"finetune-{name}", config.finetune_steps, lr=5e-4, **start)
            row[f"fine-tuned, {config.finetune_steps} steps"] = tuned["top1"]
        table[name] = row
    return table


def _draw(config: DemoConfig) -> list[Path]:
    out = config.output
    digits = LabelledDataset(open_images(str(out / "digits/val"), 6), _SIZE, crop=1.0)
    images = digits.__getitems__([(0, index) for index in range(6)]).images
    curves = plot_curves(
        out / "curves.png", {"mae": out / "mae", "mr_mae": out / "mr_mae"}, ("loss", "pixel_loss", "mimic_loss")
    )
    return [curves, _draw_reconstructions(out, images), _draw_attention(out, images)]


def _draw_reconstructions(out: Path, images: torch.Tensor) -> Path:
    columns: dict[str, Any] = {"input": as_pictures(images / 255)}
    for name in ("mae", "mr_mae"):
        student = load_model(resolve_checkpoint(out / name))
        assert isinstance(student, Student)
        ids = choose_patches(len(images), student.grid[0] * student.grid[1])
        reconstruction = reconstruct(student.eval(), images, ids)
        columns |= {
            "masked": as_pictures(reconstruction.masked),
            f"{name} prediction": as_pictures(reconstruction.completed),
        }
    return draw_grid(out / "reconstructions.png", columns, "Reconstruction from a quarter of the patches")


def _draw_attention(out: Path, images: torch.Tensor) -> Path:
    pictures = as_pictures(images / 255)
    columns: dict[str, Any] = {"input": pictures}
    for name in ("teacher", "mae", "mr_mae"):
        looker = load_teacher(TeacherConfig(spec=f"mrmae:{out / name}"), torch.device("cpu"))
        attention = looker(images).attention
        assert attention is not None
        columns[name] = overlay(pictures, as_maps(attention, looker.grid))
    return draw_grid(
        out / "attention.png",
        columns,
        "Where the last block looks (teacher: mean of the patches' queries; students: class token)",
    )


def _markdown(config: DemoConfig, table: dict[str, dict[str, float]]) -> str:
    columns = list(table["mae"])
    lines = [
        f"| digits, seed {config.seed}, {config.max_steps} steps | {' | '.join(columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    for name, row in table.items():
        cells = [f"{row[column]:.3f}" if column in row else "–" for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
