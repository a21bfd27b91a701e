"""The keys of `detect`."""

from pydantic import Field

from pipeline.config import Config, PathField
from pipeline.configs.detection import CocoConfig, DetectorConfig, JitterConfig
from pipeline.configs.models import StudentConfig
from pipeline.configs.training import EmaConfig, OptimConfig, RunConfig


class DetectionDataConfig(Config):
    """Which annotated images."""

    train: CocoConfig | None = None  # needed to train
    val: CocoConfig
    workers: int = Field(2, ge=0, le=256)  # decoding processes per training process


class DetectConfig(RunConfig):
    """Everything `detect` takes."""

    epochs: int = Field(25, ge=1)  # passes over the images
    data: DetectionDataConfig
    init: PathField | None = None  # a pre-training run, a checkpoint or a public weights file
    student: StudentConfig | None = None  # needed from scratch and for a lone weights file
    image_size: int = Field(1024, ge=32, le=4096)  # side of the canvas that images lie on, a multiple of two patches
    drop_path: float = Field(0.1, ge=0, lt=1)  # stochastic depth of the last block, rising from 0
    detector: DetectorConfig = DetectorConfig()
    jitter: JitterConfig = JitterConfig()
    optim: OptimConfig = OptimConfig(
        blr=6.4e-4, warmup_epochs=0.125, weight_decay=0.1, betas=(0.9, 0.999), layer_decay=0.7
    )
    ema: EmaConfig = EmaConfig()  # off unless ema.decay is given
    eval_every: int = Field(1, ge=1)  # epochs
    eval_batch_size: int = Field(8, ge=1)  # images that are scored, or drawn, at once, in each process
    checkpoint: PathField | None = None  # --eval: what to score; default: the newest one in output
    pictures: int = Field(0, ge=0)  # --eval: draw so many validation images beside their annotations
    picture_score: float = Field(0.5, ge=0, le=1)  # detections below are not drawn
