"""timm's plain ViTs as students, held against timm's own forward."""

import json
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.models import Classifier, Student, build_classifier, build_student, layer_ids, load_weights
from pipeline.models.timm_vit import TimmViT
from pipeline.pixels import normalise
from pipeline.training.optim import parameter_groups

# Class token, learned positions, other pixels | registers, rotary positions of DINOv3 | SwiGLU, both kinds of
# positions, a norm after the mean | registers without a class token | rotary positions for each head | a pooling head
NAMES = {
    "vit": "timm:vit_small_patch16_224.augreg_in21k_ft_in1k",
    "dinov3": "timm:vit_small_patch16_dinov3",
    "eva02": "timm:eva02_tiny_patch14_336",
    "reg4": "timm:vit_little_patch16_reg4_gap_256",
    "mixed": "timm:vit_small_patch16_rope_mixed_224",
    "siglip": "timm:vit_base_patch16_siglip_224",
}
PATCH = {"eva02": 14}


def sizes(kind: str, side: int = 4) -> dict[str, Any]:
    return {"dim": 48, "depth": 2, "num_heads": 3, "image_size": PATCH.get(kind, 16) * side}


def student(kind: str, **options: Any) -> Student:
    decoder = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
    built = build_student(NAMES[kind], **{"objective": "mae", **sizes(kind), **decoder, **options})
    for parameter in built.encoder.parameters():  # layer scales near zero and tokens at zero would hide a mix-up
        torch.nn.init.normal_(parameter, std=0.1)
    return built.eval()


def twin_of(encoder: Any) -> Any:
    """The model as timm builds it, with the encoder's weights."""
    twin = timm.create_model(encoder.named.name, num_classes=0, img_size=encoder.image_size, **encoder.changes).eval()
    state, found = twin.state_dict(), encoder.state_dict()
    final = "fc_norm." if isinstance(twin.norm, torch.nn.Identity) else "norm."
    own = {key: found[key.replace(final, "norm.")] for key in state if not key.startswith("attn_pool.")}
    assert {key.replace(final, "norm.") for key in own} == found.keys()  # timm's names, and no others
    twin.load_state_dict({**state, **own})
    return twin


def shown(encoder: Any, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Pixels as students take them, and as the model's own training normalised them."""
    images = torch.randint(0, 256, (batch, 3, *encoder.image_size), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.named.mean, encoder.named.std))
    return normalise(images), (images / 255 - mean) / std


@torch.inference_mode()
def check_all_patches_kept(encoder: Any) -> None:
    """In any order, without a mask, and through the final norm: what timm computes."""
    images, own = shown(encoder)
    cells, prefix = encoder.grid[0] * encoder.grid[1], encoder.num_prefix_tokens
    twin = twin_of(encoder)
    expected = twin.forward_intermediates(own, 1, return_prefix_tokens=True, output_fmt="NLC")[1][0]
    expected = torch.cat([expected[1], expected[0]], 1) if isinstance(expected, tuple) else expected
    scale = expected.abs().max()
    ids_keep = torch.stack([torch.randperm(cells) for _ in images])
    output = encoder(images, ids_keep)
    rows = ids_keep.argsort(1).unsqueeze(-1).expand(-1, -1, encoder.dim) + prefix
    back = torch.cat([output.last[:, :prefix], output.last.gather(1, rows)], 1)
    assert (back - expected).abs().max() / scale < 1e-5
    assert (encoder(images).last - expected).abs().max() / scale < 1e-5
    normed = (twin.fc_norm if isinstance(twin.norm, torch.nn.Identity) else twin.norm)(expected)[:, prefix:]
    torch.testing.assert_close(encoder.forward_tokens(images), normed, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", NAMES)
def test_with_all_patches_kept_it_is_timms_model(kind: str) -> None:
    check_all_patches_kept(student(kind).encoder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [("vit_small_patch16_224", 224), ("vit_small_patch16_dinov3", 256), ("eva02_tiny_patch14_224", 224),
     ("vit_medium_patch16_reg4_gap_256", 256), ("vit_small_patch14_reg4_dinov2", 224)],
)  # fmt: skip
def test_real_sizes_with_all_patches_kept(name: str, size: int) -> None:
    decoder = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
    check_all_patches_kept(build_student(f"timm:{name}", objective="mae", image_size=size, **decoder).encoder.eval())


@pytest.mark.parametrize("kind", NAMES)
def test_no_masked_pixel_leaks(kind: str) -> None:
    encoder = student(kind).encoder
    images = torch.randn(1, 3, *encoder.image_size, requires_grad=True)
    ids_keep = torch.tensor([[5, 2, 11]])
    encoder(images, ids_keep).latent.square().sum().backward()
    assert images.grad is not None
    patch = encoder.patch_size
    reached = images.grad.abs().amax(1).unfold(1, patch, patch).unfold(2, patch, patch).amax((3, 4)).flatten()
    assert reached.nonzero().flatten().tolist() == [2, 5, 11]  # and exactly 0 at all others


@pytest.mark.parametrize("kind", ["dinov3", "mixed"])
def test_gradients_through_checkpointed_blocks(kind: str) -> None:
    grads = []
    for saving in (False, True):
        torch.manual_seed(1)
        built = student(kind, gradient_checkpointing=saving)
        built(torch.ones(2, 3, 64, 64), torch.tensor([[1, 2], [3, 0]]))["loss"].backward()
        grads.append([p.grad for p in built.encoder.parameters() if p.grad is not None])
    assert len(grads[0]) == len(list(built.encoder.parameters()))
    assert all(torch.equal(plain, saved) for plain, saved in zip(*grads, strict=True))


def test_the_spec_rebuilds_it_through_json() -> None:
    built = student("dinov3", objective="mr_mae", teachers={"clip": 8})
    again = build_student(**json.loads(json.dumps(built.spec)))
    again.load_state_dict(built.state_dict())
    assert again.spec == built.spec
    assert again.encoder.blocks[0].attn.num_heads == 3


def test_learned_positions_go_to_another_grid_as_timm_resamples_them() -> None:
    for kind in ("vit", "eva02", "reg4"):
        large, small = student(kind), student(kind, **sizes(kind, side=3))
        report = load_weights(small, large.state_dict())
        assert "pos_embed" in report.resampled
        twin = twin_of(large.encoder)
        twin.set_input_size(small.encoder.image_size)
        torch.testing.assert_close(small.encoder.pos_embed, twin.pos_embed)


@pytest.mark.parametrize("kind", ["dinov3", "mixed", "siglip"])
def test_layers_of_a_classifier(kind: str) -> None:
    model = build_classifier(NAMES[kind], 3, **sizes(kind))
    ids, last = layer_ids(model)
    assert last == 3
    expected = {"encoder.blocks.0": 1, "encoder.blocks.1": 2, "fc_norm": 3, "head": 3}
    for name, layer in ids.items():
        assert layer == next((number for start, number in expected.items() if name.startswith(start)), 0), name
    undecayed = {id(p) for group in parameter_groups(model, 0.1) if not group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        is_weight = name.endswith("weight") and "norm" not in name
        assert (id(parameter) not in undecayed) == is_weight, name
    assert isinstance(model.fc_norm, torch.nn.LayerNorm)
    assert "norm.weight" not in model.state_dict()


def test_what_differs_from_the_named_model_is_known() -> None:
    encoder = build_student("timm:vit_tiny_patch16_224", objective="mae", depth=1, image_size=64).encoder
    assert isinstance(encoder, TimmViT)
    assert encoder.changes == {"depth": 1}
    assert isinstance(build_classifier("timm:vit_tiny_patch16_224", 2, depth=1, pool="cls"), Classifier)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:swin_tiny_patch4_window7_224", r"\(SwinTransformer\) is no plain ViT.*set mimic.objective=distil"),
        ("timm:convnext_tiny", r"\(ConvNeXt\) is no plain ViT"),
        ("timm:vit_small_r26_s32_224", r"no plain ViT"),  # its patches see each other in a ResNet
        ("timm:beit_base_patch16_224", r"no plain ViT"),  # tables of relative positions
        ("timm:vit_smal_patch16_224", "timm has no model 'vit_smal_patch16_224': did you mean"),
        ("timm:vit_small_patch16_224.none", "timm has no model"),
    ],
)
def test_what_cannot_be_masked_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_student(name, objective="mae")


def test_a_class_token_is_needed_for_cls_pooling() -> None:
    with pytest.raises(ConfigError, match="has no CLS token: use pool=mean"):
        build_classifier(NAMES["reg4"], 2, pool="cls", **sizes("reg4"))  # registers are no class token
