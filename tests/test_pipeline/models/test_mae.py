import pytest
import torch

from pipeline.models.mae import Decoder, pixel_loss
from pipeline.models.masking import complement, gather_tokens
from pipeline.models.sizes import Size


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_pixel_loss_is_maes_mean_over_masked_patches(norm_pix_loss: bool) -> None:
    pred, patches = torch.randn(3, 15, 48), 5 * torch.randn(3, 15, 48) + 2
    patches[:, 0] = 2.2  # as a white wall
    ids_keep = torch.rand(3, 15).argsort(1)[:, :4]
    target = patches
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    mask = torch.ones(3, 15).scatter(1, ids_keep, 0)  # 0 is keep, 1 is remove
    expected = (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()

    ids_masked = complement(ids_keep, 15)
    got = pixel_loss(gather_tokens(pred, ids_masked), gather_tokens(patches, ids_masked), norm_pix_loss)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("prefix", [0, 1])
def test_the_decoder_follows_the_formulas(prefix: int) -> None:
    decoder = Decoder(Size((24,), (1,), 2, 16, 2, 2, image_size=(24, 40), patch_size=8), prefix=prefix)
    latent, ids_keep = torch.randn(2, prefix + 4, 24), torch.rand(2, 15).argsort(1)[:, :4]
    embedded = decoder.decoder_embed(latent)
    x = decoder.mask_token.repeat(2, prefix + 15, 1)
    x[:, :prefix] = embedded[:, :prefix]
    for sample, ids in enumerate(ids_keep):
        for row, cell in enumerate(ids):
            x[sample, prefix + cell] = embedded[sample, prefix + row]
    x = x + decoder.decoder_pos_embed
    for block in decoder.decoder_blocks:
        x = block(x)
    expected = decoder.decoder_norm(x)[:, prefix:]
    tokens = decoder(latent, ids_keep)
    torch.testing.assert_close(tokens, expected)
    assert decoder.predict_pixels(tokens).shape == (2, 15, 8 * 8 * 3)
