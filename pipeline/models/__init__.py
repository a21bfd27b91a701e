"""Students: encoders (ViT, ConvViT), MR-MAE on top of them, classifiers, and their weights. Imports no other wing."""

from pipeline.configs.objectives import OBJECTIVES, Objective
from pipeline.models.build import build_classifier, build_student
from pipeline.models.classifier import Classifier, layer_ids
from pipeline.models.convvit import ConvViT
from pipeline.models.mr_mae import Student
from pipeline.models.patches import patchify, unpatchify
from pipeline.models.sizes import SIZES
from pipeline.models.vit import EncoderOutput, ViT
from pipeline.models.weights import (
    LoadReport,
    build_from_spec,
    load_model,
    load_weights,
    model_record,
    read_export,
    read_weights,
    save_weights,
)

__all__ = [
    "OBJECTIVES",
    "SIZES",
    "Classifier",
    "ConvViT",
    "EncoderOutput",
    "LoadReport",
    "Objective",
    "Student",
    "ViT",
    "build_classifier",
    "build_from_spec",
    "build_student",
    "layer_ids",
    "load_model",
    "load_weights",
    "model_record",
    "patchify",
    "read_export",
    "read_weights",
    "save_weights",
    "unpatchify",
]
