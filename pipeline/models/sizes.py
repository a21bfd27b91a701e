"""The named sizes, their overrides, and the checks that turn sizes that don't fit into one clear line."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

from pipeline.errors import ConfigError, suggest
from pipeline.models.timm_names import PREFIX, is_maskable, is_timm, timm_model


class EncoderSizes(TypedDict, total=False):
    """What may differ from the named size of an encoder; None, or no entry, is the named number.

    image_size: pixels, one number or (height, width); multiples of `patch_size`. 224 if not given.
    patch_size: pixels. ConvViT needs a multiple of 4.
    dim, depth: of the transformer. For ConvViT three numbers, or one for the last level: the first two widths then keep
        their ratio to it, and the first two depths stay.
    conv_mlp_ratio: hidden over outer width of the MLPs in ConvViT's first two levels.
    """

    image_size: int | Sequence[int]
    patch_size: int | None
    dim: int | Sequence[int] | None
    depth: int | Sequence[int] | None
    num_heads: int | None
    conv_mlp_ratio: int | None


class StudentSizes(EncoderSizes, total=False):
    """What may differ from the named size of a student, which has a decoder too."""

    decoder_dim: int | None
    decoder_depth: int | None
    decoder_heads: int | None


@dataclass(frozen=True)
class Size:
    """Widths, depths and heads of an encoder and its decoder; ConvViT's `dim` and `depth` have one entry a level.

    `mlp_ratio` is hidden over outer width of the MLPs in transformer blocks, `conv_mlp_ratio` in ConvViT's first two
    levels.
    """

    dim: tuple[int, ...]
    depth: tuple[int, ...]
    num_heads: int
    decoder_dim: int
    decoder_depth: int
    decoder_heads: int
    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    mlp_ratio: float = 4.0
    conv_mlp_ratio: int = 4

    @property
    def is_conv(self) -> bool:
        """Whether this is a ConvViT."""
        return len(self.dim) == 3

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) cells."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


# ViT-B, -L and -H are MAE's, ConvViT-B is ConvMAE's, ViT-g is that of Scaling Vision Transformers (arXiv 2106.04560)
# with MAE's decoder. The decoders of tiny and small are ours: 512 × 8 would cost several times the encoder there. The
# authors published no code for ConvViT-S, -L and -H; what others' code says of them: docs/students.md.
SIZES = {
    "mrmae_vit_tiny_patch16": Size((192,), (12,), 3, 192, 4, 3),
    "mrmae_vit_small_patch16": Size((384,), (12,), 6, 256, 4, 4),
    "mrmae_vit_base_patch16": Size((768,), (12,), 12, 512, 8, 16),
    "mrmae_vit_large_patch16": Size((1024,), (24,), 16, 512, 8, 16),
    "mrmae_vit_huge_patch14": Size((1280,), (32,), 16, 512, 8, 16, patch_size=14),
    "mrmae_vit_giant_patch14": Size((1408,), (40,), 16, 512, 8, 16, patch_size=14, mlp_ratio=48 / 11),
    "mrmae_convvit_small_patch16": Size((128, 256, 384), (2, 2, 11), 6, 256, 4, 4),
    "mrmae_convvit_base_patch16": Size((256, 384, 768), (2, 2, 11), 12, 512, 8, 16),
    "mrmae_convvit_large_patch16": Size((384, 768, 1024), (2, 2, 23), 16, 512, 8, 16),
    "mrmae_convvit_huge_patch16": Size((768, 1024, 1280), (2, 2, 31), 16, 512, 8, 16),
}

_WIDEST_DECODED = 768  # encoders of this width and above have one decoder


def resolve_size(name: str, **overrides: Unpack[StudentSizes]) -> Size:
    """The named size with the overrides that aren't None.

    Raises:
        ConfigError: unknown name; numbers that don't fit together.
    """
    named = _named_size(name)
    given: dict[str, Any] = {key: value for key, value in overrides.items() if value is not None}
    if "image_size" in given:
        given["image_size"] = _pair(given["image_size"])
    if "dim" in given:
        given["dim"] = _per_level("dim", given["dim"], named.dim, keep_ratio=True)
    if "depth" in given:
        given["depth"] = _per_level("depth", given["depth"], named.depth, keep_ratio=False)
    if "conv_mlp_ratio" in given and not named.is_conv:
        raise ConfigError(f"conv_mlp_ratio={given['conv_mlp_ratio']}: {name} has no convolution levels: leave it out")
    size = replace(named, **given)
    _check(size, is_transformer=is_maskable(name))
    return size


def _named_size(name: str) -> Size:
    """The published size; of a model of timm with the decoder that ours of that width have."""
    if not is_timm(name):
        check_choice("student", name, (*SIZES, f"{PREFIX}NAME"))
        return SIZES[name]
    model = timm_model(name)
    like = next(size for size in SIZES.values() if size.dim[-1] >= min(model.dim, _WIDEST_DECODED))
    return replace(like, dim=(model.dim,), depth=(model.depth,), num_heads=model.num_heads, patch_size=model.patch_size)


def patch_for_grid(name: str, image_size: int, grid: tuple[int, int]) -> int | None:
    """The patch size that gives the named encoder this grid (h, w); None where it is the named one, or there is none.

    Models of timm keep theirs.

    Raises:
        ConfigError: unknown name.
    """
    if is_timm(name):  # its patch is a part of what it is
        return None
    named, patch = resolve_size(name), image_size // grid[0]
    fits = (patch * grid[0], patch * grid[1]) == (image_size, image_size) and not (named.is_conv and patch % 4)
    return patch if fits and patch != named.patch_size else None


def check_choice(key: str, value: str, allowed: Collection[str]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`."""
    if value not in allowed:
        hint = suggest(value, allowed, f"use one of {', '.join(allowed)}")
        raise ConfigError(f"{key}={value!r} is unknown: {hint}")


def _pair(image_size: int | Sequence[int]) -> tuple[int, int]:
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2:
        raise ConfigError(f"image_size={image_size}: give one number, or height and width")
    return sides[0], sides[1]


def _per_level(key: str, value: int | Sequence[int], named: tuple[int, ...], keep_ratio: bool) -> tuple[int, ...]:
    """One number is the last level's; the earlier widths keep their ratio to it, the earlier depths stay."""
    if isinstance(value, int):
        earlier = [n * value // named[-1] for n in named[:-1]] if keep_ratio else named[:-1]
        return (*earlier, value)
    if len(value) != len(named):
        raise ConfigError(f"{key}={list(value)}: give one number" + (" or three" if len(named) == 3 else ""))
    return tuple(value)


def _check(size: Size, is_transformer: bool) -> None:
    if size.patch_size < 1 or (size.is_conv and size.patch_size % 4):
        raise ConfigError(f"patch_size={size.patch_size}: give a positive number, for ConvViT a multiple of 4")
    for side in size.image_size:
        if side < 1 or side % size.patch_size:
            below = max(side // size.patch_size, 1) * size.patch_size
            raise ConfigError(
                f"image_size={side} is no multiple of patch_size={size.patch_size}: the nearest that fit are"
                f" {below} and {below + size.patch_size}"
            )
    if is_transformer:  # and no network of timm that shows whole maps
        _check_transformer("", size.dim[-1], size.num_heads, size.depth)
    _check_transformer("decoder_", size.decoder_dim, size.decoder_heads, (size.decoder_depth,))
    if size.conv_mlp_ratio < 1:
        raise ConfigError(f"conv_mlp_ratio={size.conv_mlp_ratio}: give 1 or more")
    if min(size.dim) < 1:
        raise ConfigError(f"dim={list(size.dim)}: every level needs a positive width")


def _check_transformer(prefix: str, dim: int, heads: int, depth: tuple[int, ...]) -> None:
    if min(depth) < 1:
        raise ConfigError(f"{prefix}depth={', '.join(map(str, depth))}: give 1 or more")
    if dim < 4 or dim % 4:
        raise ConfigError(f"{prefix}dim={dim}: 2-D sine-cosine positions need a multiple of 4")
    if heads < 1 or dim % heads:
        key = f"{prefix or 'num_'}heads"
        raise ConfigError(f"{prefix}dim={dim} doesn't divide into {heads} heads: set {key} to a divisor of it")
