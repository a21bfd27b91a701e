"""The keys of `export`."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from pipeline.config import Config, PathField
from pipeline.configs.models import StudentConfig


def _named(repository: str) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError("give OWNER/NAME")
    return repository


def _licensed(identifier: str) -> str:
    if not re.fullmatch(r"[a-z0-9.-]+", identifier):
        raise ValueError("give the hub's identifier of a license, such as apache-2.0")
    return identifier


class ExportConfig(Config):
    """Everything `export` takes."""

    init: PathField  # a run, a checkpoint, an export, a public weights file or timm:NAME
    student: StudentConfig | None = None  # for a lone weights file
    output: PathField  # a folder that isn't there yet
    onnx: bool = False  # also model.onnx: images → tokens, and logits of a classifier
    opset: int = Field(18, ge=18)  # of ONNX
    push: Annotated[str, AfterValidator(_named)] | None = None  # upload the folder to this OWNER/NAME of the hub
    private: bool = False  # of a repository that push creates
    license: Annotated[str, AfterValidator(_licensed)] = "unknown"  # of the weights, for the card: apache-2.0
    dataset: str | None = Field(None, min_length=1)  # that the run's metrics.json was measured on, for the hub's index
