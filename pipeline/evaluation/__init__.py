"""How good frozen features are: k nearest neighbours and a linear probe, after and during pre-training."""

from pipeline.evaluation.features import FeatureFile, FeatureSets, extract_features
from pipeline.evaluation.knn import knn_classify
from pipeline.evaluation.metrics import topk_accuracy
from pipeline.evaluation.probe import ProbeHeads, linear_probe

__all__ = [
    "FeatureFile",
    "FeatureSets",
    "ProbeHeads",
    "extract_features",
    "knn_classify",
    "linear_probe",
    "topk_accuracy",
]
