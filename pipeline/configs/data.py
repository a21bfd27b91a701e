"""Images, views, masks and their order."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, Strict, model_serializer, model_validator

from pipeline.config import Config, Pair, PathField

Focus = Literal["sampled", "top-k", "random"]
OrderKind = Literal["full", "block"]


class DataConfig(Config):
    """Which images."""

    main_key: ClassVar[str] = "path"

    path: str = Field(min_length=1)  # a folder (tree or flat), or tars or parquet files (a glob or brace pattern)
    limit: int | None = Field(None, gt=0)  # at most so many, evenly spread over the whole
    workers: int = Field(2, ge=0, le=256)  # decoding processes per training process


class ValConfig(DataConfig):
    """Which images are for validation. With neither `path` nor `share` they are val/ in data.path."""

    path: str | None = Field(None, min_length=1)  # type: ignore[assignment]  # a folder, tars or parquet files
    share: float | None = Field(None, gt=0, lt=1)  # hold this share of each class of data.path back; no path then

    @model_validator(mode="after")
    def _share_is_of_data(self) -> "ValConfig":
        if self.share is not None and (self.path is not None or self.limit is not None):
            raise ValueError("val.share takes images of data.path: leave val.path and val.limit out")
        return self


class GivenImages(Config):
    """Images of any kind, labelled or not: single files, or a set."""

    images: Annotated[tuple[PathField, ...], Strict(False)] = ()  # image files
    data: DataConfig | None = None  # or images by data.path, as in extraction
    crop: float = Field(0.875, gt=0, le=1)  # central share of each image; 1 for images cut already
    eval_batch_size: int = Field(128, ge=1)  # images of a forward pass, in each process

    @model_validator(mode="after")
    def _images_or_data(self) -> "GivenImages":
        if bool(self.images) == (self.data is not None):
            raise ValueError("give either images=[FILE,...] or data.path=...")
        return self


class ViewConfig(Config):
    """How views are drawn: a random resized crop and a mirror, `count` of them for each sample."""

    count: int = Field(1, ge=1, le=1024)  # views a sample: each costs a full set of targets
    image_size: int = Field(224, ge=8, le=4096)  # side of the square that the student sees, pixels
    scale: Pair = (0.2, 1.0)  # share of the image's area
    ratio: Pair = (3 / 4, 4 / 3)  # width over height of the box
    hflip: float = Field(0.5, ge=0, le=1)  # probability of a mirrored view
    seed: int = Field(0, ge=0)  # of boxes and mirrors
    # whose antialiased bicubic; torch's crops twice as fast on a CPU with AVX2, half as fast without
    interpolation: Literal["pillow", "torch"] = "pillow"

    @model_serializer(mode="wrap")
    def _pillow_goes_without_saying(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Caches and runs from before there was a choice don't name it, and must stay what they are."""
        fields: dict[str, Any] = handler(self)
        if self.interpolation == "pillow":
            fields.pop("interpolation", None)
        return fields

    @model_validator(mode="after")
    def _ordered(self) -> "ViewConfig":
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"views.scale={list(self.scale)}: needs 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"views.ratio={list(self.ratio)}: needs 0 < low <= high")
        return self


class MaskConfig(Config):
    """Which patches the encoder sees."""

    mask_ratio: float = Field(0.75, gt=0, lt=1)  # share of the patches that are hidden
    focus: Focus = "sampled"  # by the teacher's attention; random without a cache
    masks_per_sample: int = Field(1, ge=1, le=8)  # masks trained of each image read; batch_size counts masks

    @model_validator(mode="after")
    def _several_differ(self) -> "MaskConfig":
        if self.focus == "top-k" and self.masks_per_sample > 1:
            raise ValueError("focus=top-k knows one mask a sample: use focus=sampled, or masks_per_sample=1")
        return self
