"""The keys of `predict`."""

from pydantic import Field

from pipeline.config import PathField
from pipeline.configs.data import GivenImages
from pipeline.configs.models import StudentConfig


class PredictConfig(GivenImages):
    """Everything `predict` takes."""

    init: PathField  # a fine-tuned run, a checkpoint, an export or a public weights file of a classifier
    student: StudentConfig | None = None  # for a lone weights file
    image_size: int | None = Field(None, ge=8, le=4096)  # pixels; default: the classifier's. Positions are resampled
    top: int = Field(5, ge=1)  # likeliest classes that are written for each image
    output: PathField | None = None  # the file: .csv or .jsonl; default: CSV on the screen
