"""RandAugment by timm's policies, such as MAE's fine-tuning uses, kept inside of what Pillow accepts.

augment = rand_augment("rand-m9-mstd0.5-inc1", image_size=224)
image = augment(image)  # draws from the generators of `random` and `numpy.random`
"""

from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform

Augment = Callable[[Image.Image], Image.Image]


def rand_augment(policy: str, image_size: int) -> Augment:
    """The augmentation that `policy` describes in timm's words, for RGB images of `image_size` pixels."""
    options = {
        "translate_const": int(image_size * 0.45),
        "img_mean": (124, 116, 104),  # fills what a shift uncovers
        "interpolation": Image.Resampling.BICUBIC,  # as in MAE's recipe; timm alone would draw it anew each time
    }
    augment: Any = rand_augment_transform(policy, options)
    for operation in augment.ops:
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    return augment  # type: ignore[no-any-return]


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """Keep at least one bit.

    timm's levels reach 0 bits where a magnitude is drawn at its bound: one image in 670 of the policy above. Earlier
    Pillows made a black image of it, Pillow 13 refuses. One bit is the strongest posterisation that shows anything.
    """
    return posterize(image, max(1, bits_to_keep), **options)  # type: ignore[no-any-return]
