"""The ViT against timm's, an implementation that shares its names and nothing else."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from pipeline.models.masking import gather_tokens
from pipeline.models.sizes import Size
from pipeline.models.vit import ViT

SIZE = Size((32,), (3,), 4, 16, 1, 2, image_size=(24, 40), patch_size=8)


@pytest.fixture
def vit() -> ViT:
    return ViT(SIZE, taps=(0, 2)).eval()


@pytest.fixture
def reference(vit: ViT) -> VisionTransformer:
    model = VisionTransformer(img_size=(24, 40), patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=0)
    model.load_state_dict(vit.state_dict())
    return model.eval()


def test_unmasked_tokens_equal_timms(vit: ViT, reference: VisionTransformer) -> None:
    images = torch.randn(2, 3, 24, 40)
    expected = reference.forward_features(images)
    torch.testing.assert_close(vit(images).latent, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(vit.forward_tokens(images), expected[:, 1:], rtol=0, atol=2e-6)


def test_the_map_is_the_last_blocks_output(vit: ViT) -> None:
    images = torch.randn(2, 3, 24, 40)
    (output,) = vit.forward_maps(images)
    assert output.shape == (2, *vit.map_dims, 3, 5)
    torch.testing.assert_close(output[:, :, 2, 1], vit.forward_blocks(images)[0][:, 1 + 2 * 5 + 1])


def test_masked_tokens_equal_timms_blocks_on_the_visible_patches(vit: ViT, reference: VisionTransformer) -> None:
    images, ids = torch.randn(2, 3, 24, 40), torch.rand(2, 15).argsort(1)[:, :6]
    patches = reference.patch_embed(images) + reference.pos_embed[:, 1:]
    cls = (reference.cls_token + reference.pos_embed[:, :1]).expand(2, -1, -1)
    x = torch.cat([cls, gather_tokens(patches, ids)], dim=1)
    hidden = []
    for block in reference.blocks:
        x = block(x)
        hidden.append(x[:, 1:])
    output = vit(images, ids)
    torch.testing.assert_close(output.latent, reference.norm(x), rtol=0, atol=2e-6)
    for tapped, expected in zip(output.hidden, (hidden[0], hidden[2]), strict=True):
        torch.testing.assert_close(tapped, expected, rtol=0, atol=2e-6)


def test_drop_path_grows_linearly_with_depth() -> None:
    vit = ViT(SIZE, drop_path=0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in vit.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])
