import re

import pytest
import torch
from timm import create_model
from torch import nn

from pipeline.errors import ConfigError
from pipeline.models import SIZES, Student, build_classifier, build_student
from pipeline.models.sizes import patch_for_grid

SHARED = {  # the decoder of both base models: 512 wide, 8 deep, 16 heads, 16 px patches
    "decoder_blocks": 25_219_072,
    "decoder_embed": 393_728,
    "decoder_pred": 393_984,
    "norm": 1_536,
    "decoder_norm": 1_024,
    "mask_token": 512,
}
REFERENCE = {  # counted in facebookresearch/mae and Alpha-VL/ConvMAE, fixed positions included
    "mrmae_vit_base_patch16": SHARED
    | {
        "blocks": 85_054_464,
        "patch_embed": 590_592,
        "pos_embed": 151_296,
        "decoder_pos_embed": 100_864,
        "cls_token": 768,
    },
    "mrmae_convvit_base_patch16": SHARED
    | {
        "blocks1": 1_329_664,
        "blocks2": 2_977_536,
        "blocks3": 77_966_592,
        "patch_embed1": 13_056,
        "patch_embed2": 394_368,
        "patch_embed3": 1_181_952,
        "patch_embed4": 590_592,
        "stage1_output_decode": 3_146_496,
        "stage2_output_decode": 1_180_416,
        "pos_embed": 150_528,
        "decoder_pos_embed": 100_352,
    },
}
TOTAL = {"mrmae_vit_base_patch16": 111_907_840, "mrmae_convvit_base_patch16": 115_041_408}


def itemise(model: nn.Module) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, value in model.state_dict().items():
        part = name.partition(".")[0]
        counts[part] = counts.get(part, 0) + value.numel()
    return counts


@pytest.mark.parametrize("name", REFERENCE)
def test_parameter_counts_of_base_equal_the_references(name: str) -> None:
    with torch.device("meta"):
        counts = itemise(build_student(name, objective="mae"))
    assert counts == REFERENCE[name]
    assert sum(counts.values()) == TOTAL[name]


@pytest.mark.parametrize(
    "size", ["tiny_patch16", "small_patch16", "base_patch16", "large_patch16", "huge_patch14", "giant_patch14"]
)
def test_vit_encoders_have_as_many_parameters_as_timms(size: str) -> None:
    with torch.device("meta"):
        ours = build_student(f"mrmae_vit_{size}", objective="mae").encoder
        timms = create_model(f"vit_{size}_224", num_classes=0)
    assert itemise(ours) == itemise(timms)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("cells", [14, 24])
def test_every_name_builds_at_several_sizes(name: str, cells: int) -> None:
    image_size = cells * SIZES[name].patch_size
    with torch.device("meta"):
        student: Student = build_student(name, image_size=image_size, teachers={"clip": 768})
        classifier = build_classifier(name, 1000, image_size=image_size)
    assert student.grid == classifier.grid == (cells, cells)


def test_one_width_keeps_the_ratio_of_convvits_levels_and_one_depth_is_the_last() -> None:
    with torch.device("meta"):
        encoder = build_student("mrmae_convvit_base_patch16", objective="mae", dim=96, depth=3).encoder
    widths = [encoder.get_submodule(f"patch_embed{stage}.proj").weight.shape[0] for stage in (1, 2, 3)]
    assert widths == [32, 48, 96]
    assert [len(encoder.get_submodule(f"blocks{stage}")._modules) for stage in (1, 2, 3)] == [2, 2, 3]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "mrmae_vit_bas_patch16"}, "did you mean 'mrmae_vit_base_patch16'"),
        ({"name": "resnet50"}, "use one of mrmae_vit_tiny_patch16"),
        ({"image_size": 100}, "image_size=100 is no multiple of patch_size=16: the nearest that fit are 96 and 112"),
        ({"image_size": (224, 224, 3)}, "give one number, or height and width"),
        ({"patch_size": 0}, "patch_size=0: give a positive number"),
        ({"name": "mrmae_convvit_base_patch16", "patch_size": 14, "image_size": 196}, "a multiple of 4"),
        ({"name": "mrmae_convvit_base_patch16", "depth": (2, 2)}, "depth=[2, 2]: give one number or three"),
        ({"name": "mrmae_convvit_base_patch16", "dim": (0, 8, 768)}, "every level needs a positive width"),
        ({"dim": (192, 192)}, "dim=[192, 192]: give one number"),
        ({"dim": 98, "num_heads": 2}, "dim=98: 2-D sine-cosine positions need a multiple of 4"),
        ({"num_heads": 5}, "dim=192 doesn't divide into 5 heads: set num_heads to a divisor of it"),
        ({"decoder_heads": 5}, "decoder_dim=192 doesn't divide into 5 heads: set decoder_heads"),
        ({"name": "mrmae_convvit_base_patch16", "conv_mlp_ratio": 0}, "conv_mlp_ratio=0: give 1 or more"),
        ({"conv_mlp_ratio": 2}, "conv_mlp_ratio=2: mrmae_vit_tiny_patch16 has no convolution levels: leave it out"),
        ({"depth": 0}, "depth=0: give 1 or more"),
        ({"decoder_depth": 0}, "decoder_depth=0: give 1 or more"),
    ],
)
def test_sizes_that_do_not_fit_are_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_student(**{"name": "mrmae_vit_tiny_patch16", "objective": "mae", **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "image_size", "grid", "patch"),
    [
        ("mrmae_vit_base_patch16", 224, (16, 16), 14),
        ("mrmae_vit_base_patch16", 224, (14, 14), None),  # what it has
        ("mrmae_vit_base_patch16", 224, (15, 15), None),  # no whole number of pixels
        ("mrmae_convvit_base_patch16", 224, (16, 16), None),  # a ConvViT's patch is a multiple of 4
        ("mrmae_convvit_base_patch16", 224, (28, 28), 8),
    ],
)
def test_the_patch_that_gives_a_grid(name: str, image_size: int, grid: tuple[int, int], patch: int | None) -> None:
    assert patch_for_grid(name, image_size, grid) == patch
