"""The keys of `export`."""

from pydantic import Field

from pipeline.config import Config, PathField
from pipeline.configs.models import StudentConfig


class ExportConfig(Config):
    """Everything `export` takes."""

    init: PathField  # a run, a checkpoint, an export, a public weights file or timm:NAME
    student: StudentConfig | None = None  # for a lone weights file
    output: PathField  # a folder that isn't there yet
    onnx: bool = False  # also model.onnx: images → tokens, and logits of a classifier
    opset: int = Field(18, ge=18)  # of ONNX
