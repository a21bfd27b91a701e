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
    push: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$")  # upload the folder to this OWNER/NAME of the hub
    private: bool = False  # of a repository that push creates
    license: str = Field("unknown", pattern=r"^[a-z0-9.-]+$")  # of the weights, for the card: apache-2.0
    dataset: str | None = Field(None, min_length=1)  # that the run's metrics.json was measured on, for the hub's index
