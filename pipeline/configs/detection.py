"""Annotated images, the detector, its jitter."""

from pydantic import Field, model_validator

from pipeline.config import Config, Pair, PathField


class CocoConfig(Config):
    """Annotated images."""

    images: PathField  # the folder that file names are relative to
    annotations: PathField  # instances_*.json
    limit: int | None = Field(None, gt=0)  # at most this many images, evenly spread over the file


LEVELS = 5  # of the pyramid


class DetectorConfig(Config):
    """What is built on the encoder."""

    window: int = Field(14, ge=1)  # side of an attention window, cells
    global_blocks: list[int] | None = None  # blocks that see the whole image; default: the ends of the quarters
    channels: int = Field(256, ge=4)  # of the pyramid and the heads; the box head's linear layer has four times as many
    anchors: list[int] = Field([32, 64, 128, 256, 512], min_length=LEVELS, max_length=LEVELS)  # pixels, a level each
    rois: int = Field(512, ge=1)  # proposals of an image that train the box head; a quarter of them at most the mask's
    score_threshold: float = Field(0.05, ge=0, lt=1)  # of detections that are kept
    max_detections: int = Field(100, ge=1)  # in an image


class JitterConfig(Config):
    """Large-scale jitter and mirroring, for training."""

    scale: Pair = (0.1, 2.0)  # of the longer side, in canvases
    hflip: float = Field(0.5, ge=0, le=1)  # probability

    @model_validator(mode="after")
    def _ordered(self) -> "JitterConfig":
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"jitter.scale={list(self.scale)}: needs 0 < low <= high")
        return self
