"""Labelled scenes, and what their numbers mean."""

from pydantic import Field

from pipeline.config import Config, PathField


class SceneConfig(Config):
    """Images and the labels of their pixels."""

    images: PathField  # a folder of images
    labels: PathField  # a folder of PNGs with the images' names, or COCO's instances_*.json
    limit: int | None = Field(None, gt=0)  # at most so many images, evenly spread over the whole


class LabelConfig(Config):
    """What the numbers in label PNGs mean; COCO's categories bring their own."""

    num_classes: int | None = Field(None, ge=2, le=10_000)  # needed for PNGs: 150 of ADE20K
    ignore_index: int = Field(255, ge=0)  # number of a pixel that has no class
    reduce_zero_label: bool = False  # 0 is no class, and number n is class n - 1: ADE20K
    class_names: PathField | None = None  # a JSON list or mapping, or a text of a name a line
