"""Networks of timm that learn from whole views: their last map against timm's, and against the teacher's grid."""

import json
from typing import Any

import pytest
import timm
import torch
from torch.nn import functional as F

from pipeline.errors import ConfigError
from pipeline.models import build_classifier, build_student, layer_ids
from pipeline.models.feature_map import FeatureMap
from pipeline.models.patches import resize_map
from tests.micro import NAMES

RESNET, MOBILE, SWIN = "timm:test_resnet", "timm:mobilenetv3_small_050", "timm:swin_tiny_patch4_window7_224"


def student(name: str, size: int = 64, **options: Any) -> Any:
    return build_student(name, **{"objective": "distil", "teachers": {"t": 8}, "image_size": size, **options})


@pytest.mark.parametrize("name", [RESNET, MOBILE])
def test_tokens_are_the_cells_of_timms_last_map(name: str) -> None:
    encoder = student(name).encoder.eval()
    model = timm.create_model(name.removeprefix("timm:"), features_only=True).eval()
    own = encoder.model.state_dict()
    missing = model.load_state_dict({key: own[key.replace("blocks_", "blocks.")] for key in model.state_dict()})
    assert not missing.missing_keys
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        last = model(encoder.own_pixels(images))[-1]
        torch.testing.assert_close(encoder.forward_tokens(images), last.flatten(2).transpose(1, 2))
    assert (encoder.dim, encoder.grid) == (last.shape[1], tuple(last.shape[2:]))


@pytest.mark.parametrize("grid", [(6, 6), (2, 2), (1, 1), None])
def test_the_loss_is_of_the_map_on_the_teachers_grid(grid: tuple[int, int] | None) -> None:
    built = student(RESNET, grid=grid).eval()
    cells = grid or built.encoder.grid
    images, target = torch.rand(2, 3, 64, 64), torch.randn(2, cells[0] * cells[1], 8)
    losses = built(images, torch.arange(cells[0] * cells[1]).expand(2, -1), {"t": target})
    assert losses.keys() == {"loss", "mimic_loss"}
    tokens = resize_map(built.encoder.forward_maps(images)[0], cells).flatten(2).transpose(1, 2)
    head = built.mimic["t"].heads[0]
    predicted = head(F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6))
    expected = F.mse_loss(predicted, 4 * F.layer_norm(target, (8,)))
    torch.testing.assert_close(losses["mimic_loss"], expected)


def test_maps_are_averaged_onto_fewer_cells_and_interpolated_onto_more() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert resize_map(x, (4, 4)) is x
    assert torch.equal(resize_map(x, (2, 2)), F.avg_pool2d(x, 2))
    assert torch.equal(resize_map(x, (8, 8)), F.interpolate(x, (8, 8), mode="bilinear"))
    assert torch.equal(resize_map(x, (2, 8)), F.interpolate(x, (2, 8), mode="bilinear"))


@pytest.mark.parametrize("name", [RESNET, MOBILE])
def test_each_trained_parameter_takes_part(name: str) -> None:
    """As DDP needs; what lies behind the last map is frozen."""
    built = student(name, grid=(3, 3), summary_weight=1.0)
    summaries = {"t": torch.randn(2, 8)}
    built(torch.rand(2, 3, 64, 64), torch.arange(9).expand(2, -1), {"t": torch.randn(2, 9, 8)}, None, summaries)[
        "loss"
    ].backward()
    frozen = {key.split(".")[2] for key, value in built.named_parameters() if not value.requires_grad}
    assert frozen == ({"conv_head"} if name == MOBILE else set())
    assert all(value.grad is not None for value in built.parameters() if value.requires_grad)


@pytest.mark.parametrize("family", ["vit", "convvit", "timm"])
def test_other_students_learn_from_whole_views_too(family: str) -> None:
    sizes = {"image_size": 32, "patch_size": 8, "dim": 48, "depth": 2, "num_heads": 3}
    name = NAMES.get(family, "timm:vit_small_patch16_dinov3")
    built = build_student(name, objective="distil", teachers={"t": 8}, grid=(3, 3), **sizes)
    assert built.decoder is None
    built(torch.rand(2, 3, 32, 32), torch.arange(9).expand(2, -1), {"t": torch.randn(2, 9, 8)})["loss"].backward()
    assert built.encoder.blocks[0].attn.qkv.weight.grad is not None


def test_the_spec_rebuilds_it_through_json() -> None:
    built = student(RESNET, grid=(6, 6))
    again = build_student(**json.loads(json.dumps(built.spec)))
    again.load_state_dict(built.state_dict())
    assert (again.spec, again.grid) == (built.spec, (6, 6))
    assert "grid" not in student(RESNET).spec


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.searchsorted")  # timm's resizing of tables of relative positions
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_windows_fit_the_size_of_the_images() -> None:
    encoder = student(SWIN).encoder
    assert isinstance(encoder, FeatureMap)
    assert (encoder.grid, encoder.dim) == ((2, 2), 768)


def test_a_classifier_reads_the_mean_of_the_map_and_its_layers_are_the_stages() -> None:
    model = build_classifier(RESNET, 3, image_size=64, drop_path=0.1).eval()
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(model(images), model.head(model.encoder.forward_maps(images)[0].mean((2, 3))))
    ids, last = layer_ids(model)
    assert ids["head.weight"] == last == max(ids.values())
    assert ids["encoder.model.conv1.0.weight"] == 0
    assert ids["encoder.model.layer1.0.conv1.weight"] < ids["encoder.model.layer2.0.conv1.weight"] < last
    with pytest.raises(ConfigError, match="has sizes of its own: leave out dim"):
        build_classifier(RESNET, 3, image_size=64, dim=48)
    with pytest.raises(ConfigError, match="has no CLS token"):
        build_classifier(RESNET, 3, image_size=64, pool="cls")


def test_a_network_without_stochastic_depth_is_told() -> None:
    """drop_path is 0.1 by default in fine-tuning, and timm's own answer is a TypeError."""
    with pytest.raises(ConfigError, match=r"timm:densenet121 has no stochastic depth: set drop_path=0"):
        build_classifier("timm:densenet121", num_classes=3, drop_path=0.1, image_size=64)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_widths_need_no_positions_and_no_gradient_mode(mode: Any) -> None:
    """185 channels divide by nothing; built while nothing is recorded, as where features are asked for."""
    with mode():
        built = student("timm:rexnet_100")
    assert built.encoder.dim == timm.create_model("rexnet_100", features_only=True).feature_info.channels()[-1]


def test_to_be_built_costs_no_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and what is trained are found without a number: every convolution sees the meta device alone."""
    devices = set()
    convolve = F.conv2d

    def watched(images: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        devices.add(images.device.type)
        return convolve(images, *arguments, **options)

    monkeypatch.setattr(F, "conv2d", watched)
    assert student(RESNET, size=96).encoder.grid == (3, 3)
    assert devices == {"meta"}


@pytest.mark.parametrize("name", [RESNET, MOBILE])
def test_gradient_checkpointing_counts_each_batch_once(name: str) -> None:
    """Its second forward pass leaves no trace in the batch norms, and the gradients are what they were."""
    torch.manual_seed(0)
    plain = build_classifier(name, 3, image_size=64)
    spared = build_classifier(name, 3, image_size=64, gradient_checkpointing=True)
    spared.load_state_dict(plain.state_dict())
    calls = []
    norms = {key: module for key, module in spared.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    last = list(norms)[-1]
    norms[last].register_forward_hook(lambda *_: calls.append(1), always_call=True)
    for _ in range(2):
        images = torch.rand(4, 3, 64, 64)
        for model in (plain, spared):
            model.zero_grad()
            model.train()(images).square().sum().backward()
    former, state = plain.state_dict(), spared.state_dict()
    assert len(calls) == 4  # twice for each batch
    assert norms[last].num_batches_tracked == 2
    assert all(torch.equal(former[key], state[key]) for key in state)
    gradients = dict(plain.named_parameters())
    for key, value in spared.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(value.grad, gradients[key].grad)


def test_a_network_without_a_map_is_told() -> None:
    with pytest.raises(ConfigError, match=r"timm:hiera_tiny_224 gives no map of features .*: choose another") as caught:
        student("timm:hiera_tiny_224", size=224)
    assert "\n" not in str(caught.value)
