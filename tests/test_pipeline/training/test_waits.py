"""No step makes the host wait for the device, seen without a GPU: on tensors that know their device and shape alone."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline import pixels
from pipeline.assembly.knowledge import CachedKnowledge, Knowledge, LiveKnowledge
from pipeline.assembly.samples import PretrainBatch
from pipeline.cache import Quantiser
from pipeline.configs.data import ViewConfig
from pipeline.configs.training import OptimConfig, RunConfig
from pipeline.data.labelled import LabelledBatch
from pipeline.data.masks import MaskSampler
from pipeline.models import build_classifier, build_student
from pipeline.steps import StepPlan
from pipeline.teachers import build_teacher
from pipeline.training import engine
from pipeline.training.task import Task
from stages import finetune, pretrain
from tests.fake_cuda import CUDA, fake_cuda, to_fake

SIZES: dict[str, Any] = {"image_size": 64, "depth": 2, "num_heads": 3, "dim": 48}
DECODER: dict[str, Any] = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
TEACHER: dict[str, Any] = {"spec": "timm:test_vit", "weights": "random", "image_size": 64}


class FakeRun(SimpleNamespace):
    """A run on the fake device, for which accelerate and the engine of autograd would look in vain."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        def backward(loss: Tensor) -> None:
            assert loss.requires_grad
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)

        accelerator = SimpleNamespace(
            prepare_model=lambda model, **_: model,
            prepare_optimizer=lambda optimizer: optimizer,
            backward=backward,
            no_sync=lambda _: nullcontext(),
            clip_grad_norm_=nn.utils.clip_grad_norm_,
        )
        config = RunConfig(output=folder, batch_size=8, accum_iter=2)
        common = {"device": CUDA, "resumed": None, "start_step": 0, "rank": 0, "is_main": True, "sharded": False}
        super().__init__(accelerator=accelerator, config=config, folder=folder, **common)


@pytest.fixture(autouse=True)
def _what_no_fake_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generators of a device that isn't there, the name of a card, and constants that are kept where data is."""
    monkeypatch.setattr(engine, "generators_of", lambda _: [torch.default_generator])
    monkeypatch.setattr(engine, "peak_of", lambda _: None)
    monkeypatch.setattr(pixels, "_STATISTICS", {})


def waits(
    folder: Path, waited: list[str], model: nn.Module, batch: Any, losses: Callable[..., Mapping[str, Tensor]]
) -> list[str]:
    """What the second and the third step waited for; the first may put constants on the device."""
    pixels._STATISTICS[CUDA] = torch.ones(1, 3, 1, 1, device=CUDA), torch.ones(1, 3, 1, 1, device=CUDA)
    run: Any = FakeRun(folder, model)
    plan, optim = StepPlan(4, 8, 8, 2, 1), OptimConfig(clip_grad=1.0)
    samples: Any = None  # each step is handed its batches
    loop = engine._Loop(Task("test", model, {}, losses, samples), run, plan, optim)
    loop.progress()
    for step in range(3):
        if step == 1:
            waited.clear()
        loop.train_step(step, iter([batch, batch]))
    return waited


@pytest.mark.parametrize("name", ["mrmae_vit_tiny_patch16", "mrmae_convvit_small_patch16"])
@pytest.mark.parametrize("lane", ["mae", "int8", "int4", "live"])
def test_pretraining(tmp_path: Path, name: str, lane: str) -> None:
    mimic: dict[str, Any] = {"objective": "mae"} if lane == "mae" else {"teachers": {"t": 64}}
    student = build_student(name, **SIZES, **DECODER, **mimic)
    teacher = build_teacher(**TEACHER) if lane == "live" else None
    assert teacher is None or teacher.weights_sha256  # asked of its data while there is some
    with fake_cuda() as waited:
        with CUDA:
            images = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
            ids_keep = torch.zeros(4, 4, dtype=torch.int64)
            scale = torch.ones(4, 4, dtype=torch.float16)
            packed = lane == "int4"
            stored = torch.zeros(4, 4, 32 if packed else 64, dtype=torch.uint8 if packed else torch.int8)
            gumbel = torch.zeros(4, 16, dtype=torch.float64)
        batch = PretrainBatch(images, ids_keep, {}, torch.arange(4))
        images_and_views: Any = {"source": None, "views": ViewConfig(image_size=64)}
        knowledge: Knowledge = LiveKnowledge({}, **images_and_views)
        if lane in ("int8", "int4"):
            batch.targets["t"] = stored, scale
            quantiser = Quantiser(lane, np.zeros(64, np.float32), np.ones(64, np.float32))
            reader: Any = SimpleNamespace(header=SimpleNamespace(quantiser=quantiser))
            knowledge = CachedKnowledge({"t": reader}, **images_and_views, samples=np.arange(4))
        elif teacher:
            batch.ids_keep, batch.gumbel = None, gumbel
            knowledge = LiveKnowledge({"t": to_fake(teacher)}, **images_and_views)  # type: ignore[dict-item]
        dataset = knowledge.dataset(MaskSampler(16, 4, "sampled", seed=0), student.target_rows)
        losses = pretrain._Losses(knowledge.targets(dataset))
        assert waits(tmp_path, waited, to_fake(student), batch, losses) == []


@pytest.mark.parametrize("augment", ["default", "plain"])
def test_finetuning(tmp_path: Path, augment: str) -> None:
    plain = {"mixup": 0.0, "cutmix": 0.0, "erase": 0.0}
    config = finetune.FinetuneConfig.model_validate(
        {"output": tmp_path, "data": {"path": "x"}, "augment": {} if augment == "default" else plain}
    )
    model = build_classifier("mrmae_vit_tiny_patch16", num_classes=3, drop_path=0.1, **SIZES)
    with fake_cuda() as waited:
        with CUDA:
            images, labels = torch.zeros(4, 3, 64, 64, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
        losses = finetune._Losses(config, 3)
        assert waits(tmp_path, waited, to_fake(model), LabelledBatch(images, labels, []), losses) == []


def test_what_waits_is_seen() -> None:
    with fake_cuda() as waited:
        on_device = torch.ones(3, device=CUDA)
        torch.tensor([1.0], device=CUDA)
        on_device.cpu()
        with pytest.raises(RuntimeError):  # there is no data to read a number from
            float(on_device.sum())
        with pytest.raises(RuntimeError):
            on_device[on_device > 0]
        torch.ones(3).to(CUDA, non_blocking=True)
        torch.full((2,), 0.5, device=CUDA).masked_fill_(on_device[:2] > 0, 3)
    assert waited == ["copy to cuda", "copy to cpu", "_local_scalar_dense", "index by a mask"]


def test_pixel_statistics_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In inference mode first: they are of use to training after it, all the same."""
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    with torch.inference_mode():
        first = pixels.normalise(images)
    made = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, **keys: pytest.fail("a constant is made anew"))
    again = pixels.normalise(images)
    monkeypatch.setattr(torch, "tensor", made)
    assert torch.equal(first, again)
    mean, std = pixels._STATISTICS[images.device]
    weight = torch.ones(1, 3, 1, 1, requires_grad=True)
    (weight * mean / std).sum().backward()
    assert torch.equal(weight.grad, mean / std)  # type: ignore[arg-type]
    torch.testing.assert_close(again, (images / 255 - mean / 255) / (std / 255))
