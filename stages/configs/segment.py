"""The keys of `segment`."""

from pydantic import Field

from pipeline.config import Config, Pair, PathField
from pipeline.configs.evaluation import SubjectConfig
from pipeline.configs.segmentation import LabelConfig, SceneConfig
from pipeline.configs.training import OptimConfig, RunConfig


class SegmentDataConfig(Config):
    """Which scenes."""

    train: SceneConfig | None = None  # needed to train
    val: SceneConfig
    workers: int = Field(2, ge=0, le=256)  # decoding processes per training process


class SegmentConfig(SubjectConfig, RunConfig):
    """Everything `segment` takes."""

    epochs: int = Field(32, ge=1)  # passes over the images
    data: SegmentDataConfig
    labels: LabelConfig = LabelConfig()
    scale: Pair = (0.25, 1.0)  # of training crops: their share of the image's area
    hflip: float = Field(0.5, ge=0, le=1)  # probability of a mirrored crop
    optim: OptimConfig = OptimConfig(lr=1e-3, weight_decay=1e-4, betas=(0.9, 0.999))
    eval_every: int = Field(4, ge=1)  # epochs
    eval_batch_size: int = Field(4, ge=1)  # images that are scored at once, in each process
    checkpoint: PathField | None = None  # --eval: what to score; default: the newest one in output
    pictures: int = Field(0, ge=0)  # --eval: draw so many validation images, their labels and predictions
