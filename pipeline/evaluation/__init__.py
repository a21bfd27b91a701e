"""How good frozen features are: k nearest neighbours and a linear probe, after and during pre-training."""

from pipeline.evaluation.features import FeatureFiles, FeatureSets, content_digest, extract_features
from pipeline.evaluation.knn import knn_classify
from pipeline.evaluation.metrics import topk_accuracy
from pipeline.evaluation.probe import ProbeHeads, linear_probe

__all__ = [
    "FeatureFiles",
    "FeatureSets",
    "ProbeHeads",
    "content_digest",
    "extract_features",
    "knn_classify",
    "linear_probe",
    "topk_accuracy",
]
