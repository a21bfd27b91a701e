import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import CheckpointError
from pipeline.models import (
    Student,
    build_classifier,
    build_student,
    load_model,
    load_weights,
    read_weights,
    save_weights,
)
from tests.micro import NAMES

Build = Callable[..., Student]
DECODER = ("decoder_", "mask_token")


def transformer_shapes(prefix: str, dim: int, depth: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(depth):
        for name, out, into in (("attn.qkv", 3 * dim, dim), ("attn.proj", dim, dim), ("mlp.fc1", 4 * dim, dim)):
            shapes |= linear(f"{prefix}.{block}.{name}", out, into)
        shapes |= linear(f"{prefix}.{block}.mlp.fc2", dim, 4 * dim)
        shapes |= norm(f"{prefix}.{block}.norm1", dim) | norm(f"{prefix}.{block}.norm2", dim)
    return shapes


def linear(name: str, *weight: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def norm(name: str, dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def decoder_shapes(encoder_dim: int, tokens: int) -> dict[str, tuple[int, ...]]:
    return (
        {"mask_token": (1, 1, 512), "decoder_pos_embed": (1, tokens, 512)}
        | linear("decoder_embed", 512, encoder_dim)
        | transformer_shapes("decoder_blocks", 512, 8)
        | norm("decoder_norm", 512)
        | linear("decoder_pred", 768, 512)
    )


def mae_base() -> dict[str, tuple[int, ...]]:
    """Names and shapes in facebookresearch/mae's ViT-B checkpoint with decoder."""
    return (
        {"cls_token": (1, 1, 768), "pos_embed": (1, 197, 768)}
        | linear("patch_embed.proj", 768, 3, 16, 16)
        | transformer_shapes("blocks", 768, 12)
        | norm("norm", 768)
        | decoder_shapes(768, 197)
    )


def convmae_base() -> dict[str, tuple[int, ...]]:
    """Names and shapes in Alpha-VL/ConvMAE's base checkpoint with decoder."""
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, 196, 768)}
    for stage, (into, dim, stride) in enumerate(((3, 256, 4), (256, 384, 2), (384, 768, 2)), start=1):
        shapes |= linear(f"patch_embed{stage}.proj", dim, into, stride, stride) | norm(f"patch_embed{stage}.norm", dim)
    for stage, dim in ((1, 256), (2, 384)):
        for block in (f"blocks{stage}.0", f"blocks{stage}.1"):
            shapes |= linear(f"{block}.conv1", dim, dim, 1, 1) | linear(f"{block}.conv2", dim, dim, 1, 1)
            shapes |= linear(f"{block}.attn", dim, 1, 5, 5)
            shapes |= linear(f"{block}.mlp.fc1", 4 * dim, dim, 1, 1) | linear(f"{block}.mlp.fc2", dim, 4 * dim, 1, 1)
            shapes |= norm(f"{block}.norm1", dim) | norm(f"{block}.norm2", dim)
    shapes |= linear("patch_embed4", 768, 768) | transformer_shapes("blocks3", 768, 11) | norm("norm", 768)
    shapes |= linear("stage1_output_decode", 768, 256, 4, 4) | linear("stage2_output_decode", 768, 384, 2, 2)
    return shapes | decoder_shapes(768, 196)


@pytest.mark.parametrize(
    ("name", "shapes"), [("mrmae_vit_base_patch16", mae_base()), ("mrmae_convvit_base_patch16", convmae_base())]
)
def test_public_base_checkpoints_load_as_they_are(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    with torch.device("meta"):
        student = build_student(name, objective="mae")
        mimicking = build_student(name, teachers={"clip": 768})
        public = {key: torch.empty(shape) for key, shape in shapes.items()}
    encoder_only = {key: value for key, value in public.items() if not key.startswith(DECODER)}
    assert {key: tuple(value.shape) for key, value in student.state_dict().items()} == shapes

    assert load_weights(student, public).fresh == []
    fresh = load_weights(student, encoder_only, strict=False).fresh
    assert fresh
    assert all(key.startswith(DECODER) for key in fresh)
    with pytest.raises(CheckpointError, match="missing: mask_token"):
        load_weights(student, encoder_only)
    assert all(key.startswith("mimic.") for key in load_weights(mimicking, public, strict=False).fresh)


def test_the_class_token_that_convmaes_authors_never_read_is_dropped(encoder_sizes: dict[str, Any]) -> None:
    """Their fine-tuned classifiers hold one, as their ConvViT of then had; no other name is let through."""
    model = build_classifier(NAMES["convvit"], 5, **encoder_sizes)
    public = {**model.state_dict(), "cls_token": torch.ones(1, 1, 48)}
    for strict in (True, False):
        assert load_weights(model, public, strict=strict).dropped == ["cls_token"]
    with pytest.raises(CheckpointError, match="extra: dist_token"):
        load_weights(model, {**public, "dist_token": torch.ones(1, 1, 48)}, strict=False)


def test_wider_mlps_of_convvits_first_levels_name_their_key(encoder_sizes: dict[str, Any]) -> None:
    wide = build_student(NAMES["convvit"], **encoder_sizes, objective="mae", conv_mlp_ratio=8)
    with pytest.raises(
        CheckpointError, match=r"of another shape: blocks1\.0\.mlp\.fc1\.weight.*: set student.conv_mlp_ratio=8"
    ):
        load_weights(build_student(NAMES["convvit"], **encoder_sizes, objective="mae"), wide.state_dict(), strict=False)
    assert "conv_mlp_ratio" not in build_student(NAMES["convvit"], **encoder_sizes, objective="mae").spec


@pytest.mark.parametrize("wrapper", ["model", "state_dict", ""])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_files_of_every_kind_are_read(micro: Build, tmp_path: Path, wrapper: str, suffix: str) -> None:
    state = micro("vit").state_dict()
    if suffix == ".safetensors":
        save_file(dict(state), tmp_path / f"weights{suffix}")
    else:
        prefixed = {f"module.{key}": value for key, value in state.items()}
        torch.save({wrapper: prefixed, "epoch": 3} if wrapper else prefixed, tmp_path / f"weights{suffix}")
    read, spec = read_weights(tmp_path / f"weights{suffix}")
    assert spec is None
    assert_same(read, state)


def test_a_checkpoint_folder_rebuilds_its_model(micro: Build, encoder_sizes: dict[str, Any], tmp_path: Path) -> None:
    for model in (micro("convvit"), build_classifier(NAMES["vit"], 5, pool="cls", **encoder_sizes)):
        save_weights(model, tmp_path)
        again = load_model(tmp_path)
        assert type(again) is type(model)
        assert_same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_student_becomes_a_classifier(micro: Build, encoder_sizes: dict[str, Any], kind: str, pool: str) -> None:
    if kind == "convvit" and pool == "cls":
        pool = "mean"
    student = micro(kind)
    classifier = build_classifier(NAMES[kind], 5, pool=pool, **encoder_sizes)
    report = load_weights(classifier, student.state_dict(), strict=False)

    assert {key.partition(".")[0] for key in report.fresh} == {"head"} | ({"fc_norm"} if pool == "mean" else set())
    images = torch.randn(2, 3, 32, 32)
    for ours, theirs in zip(
        classifier.encoder.forward_blocks(images)[0], student.encoder.forward_blocks(images)[0], strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    dropped = {key.partition(".")[0] for key in report.dropped}
    assert {"mask_token", "decoder_blocks", "mimic"} < dropped
    assert "fresh: " in str(report)
    assert "decoder_blocks (24)" in str(report)
    with pytest.raises(CheckpointError, match="missing"):
        load_weights(classifier, student.state_dict())


def test_a_classifier_of_other_classes_keeps_all_but_the_head(encoder_sizes: dict[str, Any]) -> None:
    ten, five = (build_classifier(NAMES["vit"], n, **encoder_sizes) for n in (10, 5))
    report = load_weights(five, ten.state_dict(), strict=False)
    assert report.fresh == ["head.weight", "head.bias"]
    with pytest.raises(CheckpointError, match=re.escape("of another shape: head.weight [10, 48] for [5, 48]")):
        load_weights(five, ten.state_dict())


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_another_model_never_load_in_silence(micro: Build, strict: bool) -> None:
    """One project evaluated its checkpoints at 1.1%, because strict=False loaded nothing."""
    vit, convvit = micro("vit"), micro("convvit")
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"missing: cls_token.*extra: patch_embed1"):
        load_weights(vit, convvit.state_dict(), strict=strict)
    with pytest.raises(CheckpointError, match="missing: cls_token"):
        load_weights(vit, {f"backbone.{key}": value for key, value in before.items()}, strict=strict)
    with pytest.raises(CheckpointError, match="of another shape: cls_token"):
        load_weights(vit, micro("vit", dim=96).state_dict(), strict=strict)
    assert_same(vit.state_dict(), before)


def test_a_deeper_checkpoint_does_not_lose_its_last_blocks(micro: Build) -> None:
    with pytest.raises(CheckpointError, match=re.escape("extra: blocks.3")):
        load_weights(micro("vit"), micro("vit", depth=4).state_dict(), strict=False)


def test_positions_of_another_grid_are_resampled(micro: Build, kind: str) -> None:
    small, large = micro(kind), micro(kind, image_size=(48, 64))
    report = load_weights(large, small.state_dict())
    assert sorted(report.resampled) == ["decoder_pos_embed", "pos_embed"]
    prefix, positions = small.encoder.num_prefix_tokens, small.encoder.pos_embed
    image = positions[0, prefix:].T.reshape(1, 48, 4, 4)
    expected = F.interpolate(image, (6, 8), mode="bicubic", align_corners=False).flatten(2)[0].T
    assert torch.equal(large.encoder.pos_embed[0, :prefix], positions[0, :prefix])
    assert torch.equal(large.encoder.pos_embed[0, prefix:], expected)


def test_positions_of_another_grid_that_is_not_square_are_refused(micro: Build) -> None:
    square = micro("vit", image_size=(64, 64))
    with pytest.raises(CheckpointError, match="of another shape: pos_embed"):
        load_weights(square, micro("vit", image_size=(16, 24)).state_dict())


def test_unreadable_files_are_one_clear_line(tmp_path: Path, micro: Build) -> None:
    class Code:
        pass

    good = tmp_path / "good.safetensors"
    save_file(dict(micro("vit").state_dict()), good)
    (tmp_path / "torn.safetensors").write_bytes(good.read_bytes()[:-100])
    torch.save({"model": micro("vit").state_dict()}, tmp_path / "good.pth")
    (tmp_path / "torn.pth").write_bytes((tmp_path / "good.pth").read_bytes()[:-1000])
    torch.save({"model": 3}, tmp_path / "empty.pth")
    torch.save({"args": re.compile("code"), "model": micro("vit").state_dict()}, tmp_path / "code.pth")
    (tmp_path / "weights.ckpt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name, message in {
        "absent.pth": "no such file",
        "torn.safetensors": "is torn",
        "torn.pth": "is torn",
        "empty.pth": "holds no tensors",
        "code.pth": "holds more than tensors and is refused",
        "weights.ckpt": "is empty",
        "folder": "model.safetensors: no such file",
    }.items():
        with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
            read_weights(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"kind": "teacher"}, "kind='teacher' is neither student nor classifier"),
        ({"kind": "student", "name": "mrmae_vit_tiny_patch16", "colour": 3}, "doesn't describe a student"),
        ([], "holds no keys and values"),
    ],
)
def test_a_foreign_model_json_is_one_clear_line(micro: Build, tmp_path: Path, record: Any, message: str) -> None:
    save_weights(micro("vit"), tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_model(tmp_path)


def test_a_lone_file_does_not_say_what_model_it_is(micro: Build, tmp_path: Path) -> None:
    save_weights(micro("vit"), tmp_path)
    with pytest.raises(CheckpointError, match="is a lone file"):
        load_model(tmp_path / "model.safetensors")


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
