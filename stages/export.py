"""Write a trained encoder for other programs, and publish it.

A ViT goes to timm, a ConvViT to safetensors and JSON, both to ONNX:

    mrmae export init=runs/photos output=exports/photos onnx=true
    timm.create_model("local-dir:exports/photos", pretrained=True)  # and model.onnx beside it

Reads a checkpoint (init), and metrics.json of its run. Writes a new folder, output, and only if the written weights
give the same features when they are loaded again; its README.md is a model card. With push=OWNER/NAME it goes to the
Hugging Face hub. Costs two forward passes, and the upload.

timm has no ConvViT: its safetensors has the reference code's names, and its JSON says how the numbers are to be used.
"""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.assembly.model_card import describe, model_card, origin_of
from pipeline.assembly.students import class_names, load_encoder
from pipeline.cards import FILE as CARD
from pipeline.errors import CheckpointError, ConfigError
from pipeline.files import whole_file, whole_folder
from pipeline.hub import push_folder
from pipeline.models import Classifier, ConvViT, Student, build_classifier, build_student, load_weights
from pipeline.models.feature_map import FeatureMap
from pipeline.models.timm_vit import TimmViT
from pipeline.models.vit import PlainViT
from pipeline.pixels import IMAGENET_MEAN, IMAGENET_STD
from pipeline.tensor_files import save_tensors
from pipeline.training.checkpoint import resolve_checkpoint
from stages.configs.export import ExportConfig

# Cosine between our features and those of what was written; fp32 in another order of operations is nearer than this.
_FAITHFUL = 0.99999
# timm's name for each width; the arguments say all that differs from it.
_NEAREST = {
    width: f"vit_{size}_patch16_224" for width, size in ((192, "tiny"), (384, "small"), (768, "base"), (1024, "large"))
}
_SIZES = ("name", "image_size", "patch_size", "dim", "depth", "num_heads")  # what decides the encoder


def run(config: ExportConfig) -> dict[str, Any]:
    """Write the folder, whole or not at all; returns what it holds and how near its features are.

    Raises:
        ConfigError: the folder is there already, or the ONNX exporter isn't installed.
        CheckpointError: no such checkpoint, or what was written doesn't give the same features.
    """
    if config.output.exists():
        raise ConfigError(f"output={config.output} is there already: choose another folder")
    if config.onnx and importlib.util.find_spec("onnxscript") is None:
        raise ConfigError("onnx=true, but its exporter isn't installed: pip install -e '.[onnx]'")
    model = load_encoder(config.init, config.student).eval()
    names = class_names(resolve_checkpoint(config.init)) if isinstance(model, Classifier) else ()
    with whole_folder(config.output) as partial:
        write = next(write for kind, write in _WRITERS.items() if isinstance(model.encoder, kind))
        facts = write(model, partial, names)
        if config.onnx:
            facts |= _write_onnx(model, partial / "model.onnx", config.opset)
        repo = config.push or f"OWNER/{config.output.name}"
        card = model_card(repo, describe(model, facts), origin_of(config.init), config.license, config.dataset)
        (partial / CARD).write_text(card, encoding="utf-8")
    written = {"written": str(config.output), **facts}
    if config.push is not None:
        written["pushed"] = push_folder(config.output, config.push, config.private, keep=CARD)
    return written


def _write_timm(model: Student | Classifier, folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """A folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` opens.

    timm's ViT has MAE's parameter names already, and a student of timm goes back to where it is from. A student's copy
    ends in its final norm and pools the patch tokens by the mean, which gives the features that k-NN and probes read; a
    classifier's copy pools as it was trained to, and says what its classes are called.
    """
    encoder = model.encoder
    assert isinstance(encoder, PlainViT)
    pool = "token" if isinstance(model, Classifier) and model.pool == "cls" else "avg"
    norms_mean = isinstance(model, Classifier) and pool == "avg"
    arguments: dict[str, Any] = {
        "img_size": list(encoder.image_size),
        "global_pool": pool,
        "num_classes": model.head.out_features if isinstance(model, Classifier) else 0,
    }
    if isinstance(encoder, TimmViT):
        name, mean, std = encoder.named.name, encoder.named.mean, encoder.named.std
        arguments |= encoder.changes | {"use_fc_norm" if encoder.family is Eva else "fc_norm": norms_mean}
    else:
        name = _NEAREST.get(encoder.dim, _NEAREST[768])
        mean, std = IMAGENET_MEAN, IMAGENET_STD  # timm's own entries of these names normalise pixels otherwise
        arguments |= {
            "patch_size": encoder.patch_size,
            "embed_dim": encoder.dim,
            "depth": len(encoder.blocks),
            "num_heads": _heads(encoder),
            "mlp_ratio": encoder.mlp_ratio,
            "fc_norm": norms_mean,
        }
    preprocessing = {
        "input_size": (3, *encoder.image_size),
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "mean": mean,
        "std": std,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "fixed_input_size": True,
    }
    state = _state(model)
    twin = timm.create_model(name, pretrained_cfg=preprocessing, **arguments)
    twin.load_state_dict(state, strict=True)
    _save_timm(twin, folder, {"student": _sizes(model), "label_names": names}, arguments)
    again: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def tokens(images: Tensor) -> Tensor:
        features = again.forward_features(encoder.own_pixels(images))
        return again.fc_norm(features[:, again.num_prefix_tokens :])  # type: ignore[no-any-return]

    cosine = _agreement(_tokens(model), tokens, encoder.image_size)
    return {"format": "timm", "parameters": sum(value.numel() for value in state.values()), "cosine": cosine}


def _write_feature_map(model: Student | Classifier, folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """The network as timm has it, without a head; a classifier's is `head.safetensors`, of the mean of the last map.

    timm puts layers of its own between map and classifier in some networks, so the head has no place there.
    """
    encoder = model.encoder
    assert isinstance(encoder, FeatureMap)
    arguments: dict[str, Any] = {"num_classes": 0}
    if hasattr(encoder.model, "set_input_size"):
        arguments["img_size"] = list(encoder.image_size)
    preprocessing = {"input_size": (3, *encoder.image_size), "mean": encoder.named.mean, "std": encoder.named.std}
    twin = timm.create_model(encoder.named.name, pretrained_cfg=preprocessing, **arguments)
    twin.load_state_dict(encoder.model.state_dict(), strict=True)
    _save_timm(twin, folder, {"student": _sizes(model), "label_names": names}, arguments)
    if isinstance(model, Classifier):
        save_tensors(dict(model.head.state_dict()), folder / "head.safetensors")
    again: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def tokens(images: Tensor) -> Tensor:
        (last,) = again.forward_intermediates(encoder.own_pixels(images), 1, output_fmt="NCHW", intermediates_only=True)
        return last.flatten(2).transpose(1, 2)  # type: ignore[no-any-return]

    cosine = _agreement(_tokens(model), tokens, encoder.image_size)
    return {"format": "timm", "parameters": sum(value.numel() for value in twin.parameters()), "cosine": cosine}


def _save_timm(model: Any, folder: Path, description: dict[str, Any], arguments: dict[str, Any]) -> None:
    weights = folder / "model.safetensors"
    with whole_file(weights) as partial:  # for its mode
        save_for_hf(model, str(folder), description, arguments, safe_serialization=True)
        weights.rename(partial)


def _write_own(model: Student | Classifier, folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """model.safetensors, whose metadata repeat config.json, so that neither file is mute without the other."""
    encoder = model.encoder
    assert isinstance(encoder, ConvViT)
    sizes = _sizes(model)
    description = {
        "format": "mrmae-encoder-1",
        "architecture": "ConvViT of ConvMAE (arXiv 2205.03892), parameter names of Alpha-VL/ConvMAE",
        "student": sizes,
        "image_size": list(encoder.image_size),
        "patch_size": encoder.patch_size,
        "grid": list(encoder.grid),
        "dim": encoder.dim,
        "num_heads": _heads(encoder),
        "num_prefix_tokens": 0,
        "num_classes": model.head.out_features if isinstance(model, Classifier) else 0,
        **({"label_names": names} if names else {}),
        "tokens": "blocks3's output, then fc_norm (eps 1e-6)"
        if isinstance(model, Classifier)
        else "blocks3's output without the stage-1/2 addition, then a LayerNorm without parameters (eps 1e-6)",
        "pixels": {
            "range": "RGB in 0..1, then (x - mean) / std",
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
        },
    }
    text = json.dumps(description, indent=1)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    state = _state(model)
    save_tensors(state, folder / "model.safetensors", {"config": text})
    again = _rebuild(model, sizes, load_file(folder / "model.safetensors"))
    cosine = _agreement(_tokens(model), _tokens(again), encoder.image_size)
    return {"format": "mrmae-encoder-1", "parameters": sum(value.numel() for value in state.values()), "cosine": cosine}


def _rebuild(model: Student | Classifier, sizes: dict[str, Any], state: dict[str, Tensor]) -> Student | Classifier:
    """A model of the described sizes with the written weights; a student's decoder, which nothing reads, is fresh."""
    again: Student | Classifier
    if isinstance(model, Classifier):
        again = build_classifier(num_classes=model.head.out_features, pool=model.pool, **sizes)
    else:
        again = build_student(objective="mae", **sizes)
    load_weights(again, state, strict=False)
    return again.eval()


_WRITERS: dict[type, Callable[[Student | Classifier, Path, Sequence[str]], dict[str, Any]]] = {
    PlainViT: _write_timm,
    FeatureMap: _write_feature_map,
    ConvViT: _write_own,
}


class _Outputs(nn.Module):
    """What the ONNX graph gives: tokens [B, L, D] and, of a classifier, logits [B, classes]."""

    def __init__(self, model: Student | Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        tokens = _tokens(self.model)(images)
        return (tokens, self.model(images)) if isinstance(self.model, Classifier) else (tokens,)


def _write_onnx(model: Student | Classifier, file: Path, opset: int) -> dict[str, Any]:
    """A graph for any batch size, and its agreement with the model if onnxruntime is there to run it."""
    sides = model.encoder.image_size
    names = ["tokens", "logits"] if isinstance(model, Classifier) else ["tokens"]
    program = torch.onnx.export(
        _Outputs(model).eval(),
        (torch.zeros(2, 3, *sides),),
        dynamo=True,
        verbose=False,
        opset_version=opset,
        input_names=["images"],
        output_names=names,
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
    )
    assert program is not None
    program.save(str(file), external_data=False)
    if importlib.util.find_spec("onnxruntime") is None:
        return {"onnx": f"opset {opset}, not run: onnxruntime isn't installed"}
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    cosine = _agreement(
        _tokens(model), lambda images: torch.from_numpy(session.run(["tokens"], {"images": images.numpy()})[0]), sides
    )
    return {"onnx": f"opset {opset}", "onnx_cosine": cosine}


def _sizes(model: Student | Classifier) -> dict[str, Any]:
    """What an `init` that names the export needs to know."""
    return {key: value for key, value in model.spec.items() if key in _SIZES and value is not None}


def _heads(encoder: PlainViT | ConvViT) -> int:
    attention: Any = encoder.blocks[0].attn
    return int(attention.num_heads)


def _state(model: Student | Classifier) -> dict[str, Tensor]:
    """The encoder's tensors by the reference code's names and, of a classifier, its `fc_norm` and `head`."""
    state = dict(model.encoder.state_dict())
    if isinstance(model, Classifier):
        state |= {name: value for name, value in model.state_dict().items() if name.startswith(("fc_norm.", "head."))}
    return {name: value.detach().contiguous() for name, value in state.items()}


def _tokens(model: Student | Classifier) -> Callable[[Tensor], Tensor]:
    """Normalised images → the patch tokens that k-NN and probes read."""
    return model.forward_tokens if isinstance(model, Classifier) else model.encoder.forward_tokens


@torch.inference_mode()
def _agreement(
    model: Callable[[Tensor], Tensor], exported: Callable[[Tensor], Tensor], sides: tuple[int, int]
) -> float:
    """The worst token's cosine on three random images.

    Raises:
        CheckpointError: it is below `_FAITHFUL`.
    """
    images = torch.randn(3, 3, *sides, generator=torch.Generator().manual_seed(0))
    cosine = float(F.cosine_similarity(model(images).double(), exported(images).double(), dim=-1).min())
    if not cosine >= _FAITHFUL:  # NaN is not faithful either
        raise CheckpointError(
            f"the exported features differ from ours (cosine {cosine:.6f}): update timm, or report it"
        )
    return cosine
