"""ConvViT: both paths against the paper's formulas written out, and against each other."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.models import build_student
from pipeline.models.convvit import ConvViT
from pipeline.models.masking import gather_tokens
from pipeline.models.sizes import Size

DEPTH = (2, 1, 2)


def build(image_size: tuple[int, int] = (24, 40), patch_size: int = 8, **options: Any) -> ConvViT:
    return ConvViT(Size((8, 12, 24), DEPTH, 3, 16, 1, 2, image_size, patch_size), **options)


def masked_levels(state: dict[str, Tensor], images: Tensor, visible: Tensor, factor: int) -> list[Tensor]:
    """Embedding 3 and the outputs of levels 1 and 2 [B, D, h, w], by whole-map convolutions, from the weights alone.

    `visible` [B, h, w] is 1 or 0; norms over channels at torch's eps 1e-5.
    """

    def conv(x: Tensor, name: str, **kwargs: Any) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **kwargs)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        weight, bias = (state[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    x, outputs = images, []
    for stage, stride, fine in ((1, factor, 4), (2, 2, 2)):
        x = F.gelu(norm(conv(x, f"patch_embed{stage}.proj", stride=stride), f"patch_embed{stage}.norm"))
        mask = torch.kron(visible, torch.ones(fine, fine)).unsqueeze(1)
        for block in range(DEPTH[stage - 1]):
            name = f"blocks{stage}.{block}"
            mixed = mask * conv(norm(x, f"{name}.norm1"), f"{name}.conv1")
            x = x + conv(conv(mixed, f"{name}.attn", padding=2, groups=x.shape[1]), f"{name}.conv2")
            x = x + conv(F.gelu(conv(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        outputs.append(conv(x, f"stage{stage}_output_decode", stride=fine))
    return [F.gelu(norm(conv(x, "patch_embed3.proj", stride=2), "patch_embed3.norm")), *outputs]


@pytest.mark.parametrize("sparse", [True, False])
def test_the_paths_follow_the_formulas(sparse: bool) -> None:
    encoder, images = build(sparse=sparse), torch.randn(2, 3, 24, 40)
    ids = torch.rand(2, 15).argsort(1)[:, :6]
    visible = torch.zeros(2, 15).scatter(1, ids, 1).view(2, 3, 5)
    expected = [gather_tokens(x.flatten(2).mT, ids) for x in masked_levels(encoder.state_dict(), images, visible, 2)]
    x, outputs = encoder._levels(images, ids, decode=True)
    for got, want in zip([x, *outputs], expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)

    output = encoder(images, ids)
    block_output, _ = encoder.forward_blocks(images, ids)
    torch.testing.assert_close(output.latent, encoder.norm(block_output + expected[1] + expected[2]), rtol=0, atol=1e-5)
    tokens = F.layer_norm(encoder.forward_blocks(images)[0], (24,))  # no addition
    torch.testing.assert_close(encoder.forward_tokens(images), tokens, rtol=0, atol=1e-4)


@pytest.mark.parametrize("patch_size", [4, 8, 12, 16])
@pytest.mark.parametrize("keep", [1, 7, 15])
def test_sparse_equals_dense_on_odd_sizes(patch_size: int, keep: int) -> None:
    encoder = build((3 * patch_size, 5 * patch_size), patch_size=patch_size)
    images, ids = torch.randn(3, 3, *encoder.image_size), torch.rand(3, 15).argsort(1)[:, :keep]
    goal = torch.randn(3, keep, 24)
    assert_equal_paths(encoder, encoder, images, ids, lambda: (encoder(images, ids).latent - goal).square().mean())


def test_sparse_equals_dense_on_base_at_224() -> None:
    student = build_student("mrmae_convvit_base_patch16", teachers={"clip": 768}, depth=1, decoder_depth=1)
    images, ids = torch.randn(1, 3, 224, 224), torch.rand(1, 196).argsort(1)[:, :49]
    targets = {"clip": torch.randn(1, 49, 768)}
    assert_equal_paths(student.encoder, student, images, ids, lambda: student(images, ids, targets)["loss"])


def assert_equal_paths(encoder: Any, model: torch.nn.Module, images: Tensor, ids: Tensor, loss_of: Any) -> None:
    """Forward, and every parameter's gradient, within 1e-5; gradients also within 1e-4 of their own largest entry."""
    results = []
    for sparse in (True, False):
        encoder.sparse = sparse
        model.zero_grad()
        latent = encoder(images, ids).latent.detach()
        loss_of().backward()
        results.append((latent, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (sparse_latent, sparse_grads), (dense_latent, dense_grads) = results
    torch.testing.assert_close(sparse_latent, dense_latent, rtol=0, atol=1e-5)
    assert sparse_grads.keys() == dense_grads.keys()
    assert len(sparse_grads) == sum(p.requires_grad for p in model.parameters())
    for name, dense in dense_grads.items():
        difference = (sparse_grads[name] - dense).abs().max()
        assert difference <= 1e-5, name
        assert difference <= 1e-4 * dense.abs().max() + 1e-9, name


def test_unmasked_equals_all_cells_visible() -> None:
    encoder, images = build(), torch.randn(2, 3, 24, 40)
    everything = torch.arange(15).expand(2, -1)
    torch.testing.assert_close(encoder(images).latent, encoder(images, everything).latent, rtol=0, atol=1e-5)


def test_drop_path_counts_all_three_levels() -> None:
    encoder = build(drop_path=0.4)
    conv = [block.drop_path.drop_prob for block in (*encoder.blocks1, *encoder.blocks2)]
    last = [block.drop_path1.drop_prob for block in encoder.blocks3]
    assert conv + last == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_the_maps_are_the_three_levels_outputs() -> None:
    """The finest two, decoded, are what the dense path adds to the last block's output before its norm."""
    encoder, images = build().eval(), torch.randn(2, 3, 24, 40)
    fine, middle, last = encoder.forward_maps(images)
    assert [m.shape for m in (fine, middle, last)] == [
        (2, dim, 3 * f, 5 * f) for dim, f in zip(encoder.map_dims, (4, 2, 1), strict=True)
    ]
    added = encoder.stage1_output_decode(fine) + encoder.stage2_output_decode(middle) + last
    torch.testing.assert_close(encoder.norm(added.flatten(2).transpose(1, 2)), encoder(images).latent)
