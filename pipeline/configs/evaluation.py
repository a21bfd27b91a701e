"""Frozen features, and k-NN during pre-training."""

from pydantic import Field, model_validator

from pipeline.config import Config, PathField
from pipeline.configs.data import DataConfig, ValConfig
from pipeline.configs.models import StudentConfig
from pipeline.configs.teachers import TeacherConfig


class KnnCallbackConfig(Config):
    """k-NN every so many epochs."""

    data: DataConfig  # labelled images whose neighbours vote
    val: DataConfig  # labelled images that are classified
    every: float = Field(10, gt=0)  # epochs
    k: int = Field(20, ge=1)  # neighbours that vote
    temperature: float | None = Field(0.07, gt=0)  # as in `knn`
    crop: float = Field(0.875, gt=0, le=1)  # central share of each image; 1 for images cut already
    eval_batch_size: int = Field(128, ge=1)  # images of a forward pass, in each process


class SubjectConfig(Config):
    """What is frozen."""

    init: PathField | None = None  # a run, a checkpoint, an export, a public weights file or timm:NAME
    student: StudentConfig | None = None  # for a lone weights file, or an untrained student
    teacher: TeacherConfig | None = None  # a teacher instead
    image_size: int | None = Field(None, ge=8, le=4096)  # pixels; default: what the model was built for, else 224

    @model_validator(mode="after")
    def _init_or_teacher(self) -> "SubjectConfig":
        if self.teacher is not None and self.init is not None:
            raise ValueError("give one of init and teacher.spec")
        return self


class FrozenConfig(SubjectConfig):
    """What is frozen, and the images that it is measured on."""

    data: DataConfig  # labelled images that the classifier learns from, or a folder that holds train/ and val/
    val: ValConfig | None = None  # labelled images that it is measured on; default: val/ in data.path
    pixels: bool = False  # measure raw pixels instead
    crop: float = Field(0.875, gt=0, le=1)  # central share of each image; 1 for images cut already
    eval_batch_size: int = Field(128, ge=1)  # images of a forward pass, in each process
    seed: int = Field(0, ge=0)  # of an untrained student
    output: PathField | None = None  # folder for metrics.json
    features: PathField | None = None  # folder that keeps features for the next command; default: features/ in output

    @model_validator(mode="after")
    def _pixels_alone(self) -> "FrozenConfig":
        if self.pixels and (self.teacher is not None or self.init is not None):
            raise ValueError("give one of init, teacher.spec and pixels=true")
        return self
